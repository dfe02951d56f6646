// fused_linear on a CPU for many rows of x: matrix products, of bf16 where x and W are that and the level multiplies it,
// else of fp32.
//
// Floor. 2 * N * O * E operations at the rate of the products (matmul.h), or for few rows one read of W.
// - x is the product's packed operand, 32 rows (normed) a panel, once a call; W is read where it lies, a block of its rows
//   at a time, which stays in the second-level cache while all panels meet it. Packing W, of which each element meets
//   only N rows, would cost more than turning the outputs over, of which there are fewer than products by a factor of E.
//   A W of another type than the products' is widened, a block at a time.
// - While a block is multiplied, the next one is fetched: by vectors where few panels meet it, since its rows are
//   streams side by side, which no prefetcher follows.
// - Norm, bias, activation and residual are done where the data is: no tensor between them goes through memory.
//
// An output is one sum in the order of E, whoever computes it: the result does not depend on the number of threads, nor on
// which other rows x has.
#include "tiles.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "scratch.h"
#include "share.h"

namespace mc {
namespace {

constexpr int64_t kBlock = 64;                // rows of W, twice where they are gated
constexpr int64_t kHalfBlock = 32;            // the same where there are few panels, so that there are tasks enough
constexpr int64_t kFewPanels = 4;             // of a group, at least
constexpr int64_t kGroupBytes = 3 << 18;      // of panels that all blocks meet in turn: what that cache holds beside a block
constexpr int64_t kTasksPerThread = 8;        // evens out threads that are slowed down
constexpr int64_t kThreadWork = 1 << 20;      // multiply-adds that are worth waking a thread for
constexpr int64_t kTurnedStep = kBlock + 16;  // floats
constexpr int64_t kLine = 64;
constexpr int64_t kVectorRows = 14;           // of W that vectors multiply together, at most
constexpr int64_t kVectorColumns = 8;         // of x, of which vectors leave out what a panel has too many
// Rows of x up to which one stream over W is no slower than products by matrix tiles, and by vectors (bench/README.md).
constexpr int64_t kFewRowsOfTiles = 4, kFewRowsOfVectors = 24;

int product_type(const mc_fused_linear_args& a, const MatmulOps& matmul) {
    return a.x.dtype == MC_BF16 && a.weight.dtype == MC_BF16 && matmul.multiply[kBF16] ? kBF16 : kF32;
}

bool in_matrix_tiles(const mc_fused_linear_args& a, const MatmulOps& matmul) {
    return matmul.outruns_memory && product_type(a, matmul) == kBF16;
}

class LinearTiles {
public:
    LinearTiles(const mc_fused_linear_args& a, const Linear& x, const IsaLevel& level, const LinearOps& ops,
                int n_threads)
        : a_(a),
          x_(x),
          matmul_(*level.matmul),
          ops_(ops),
          type_(product_type(a, matmul_)),
          matrix_tiles_(in_matrix_tiles(a, matmul_)),
          steps_(product_steps(type_, x.inputs)),
          panel_bytes_(panel_bytes(type_, x.inputs)),
          row_bytes_(product_row_bytes(type_, x.inputs)),
          panels_(panels_of(x.rows)),
          halves_(a.swiglu ? 2 : 1),
          x_in_place_(!x.norm && multiplied_as(a.x.dtype)),
          w_in_place_(multiplied_as(a.weight.dtype)),
          data_(panels_ * panel_bytes_),
          gain_(x.norm ? x.inputs : 0),
          bias_(x.bias ? halves_ * x.outputs : 0) {
        const int64_t work = x.rows * x.inputs * x.outputs * halves_;
        threads_ = std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(work / kThreadWork, 1));
        block_ = type_ == kF32 || panels_ <= kFewPanels ? kHalfBlock : kBlock;
        blocks_ = (x.outputs + block_ - 1) / block_;
        const int64_t most = std::max<int64_t>(kGroupBytes / panel_bytes_, 1);
        groups_ = (panels_ + most - 1) / most;
        if (threads_ > 1) {
            const int64_t wanted = (threads_ * kTasksPerThread + blocks_ - 1) / blocks_;
            groups_ = std::max(groups_, std::min(wanted, panels_ / kFewPanels));
        }
        scratch_.reserve(static_cast<size_t>(threads_));
        for (int64_t i = 0; i < threads_; ++i) scratch_.emplace_back(*this);
    }

    void run() {
        widen_vector(a_.norm, gain_.get());
        widen_vector(a_.bias, bias_.get());
        share(panels_, [&](int64_t panel, Work& w) { pack_rows(panel, w); });
        share(blocks_ * groups_, [&](int64_t i, Work& w) { multiply(i % blocks_, i / blocks_, w); });
    }

private:
    // Of one thread: rows of x on their way to a panel, and rows of W with zeros behind them, where they need any.
    struct Work {
        Scratch<char> x, w[2];

        explicit Work(const LinearTiles& t) {
            if (!t.x_in_place_) x = Scratch<char>(kPanel * t.row_bytes_);
            for (int64_t h = 0; !t.w_in_place_ && h < t.halves_; ++h) w[h] = Scratch<char>(t.block_ * t.row_bytes_);
        }
    };

    // Whether rows of this type are what a product takes, which for bf16 ends in zeros.
    bool multiplied_as(int dtype) const {
        return type_ == kF32 ? dtype == MC_F32 : x_.inputs % (2 * kTileSteps) == 0;
    }

    // body(item, work) for every item, on all threads.
    template <class Body>
    void share(int64_t items, const Body& body) {
        share_items(items, scratch_, matmul_, body);
    }

    void widen_vector(const mc_tensor& x, float* out) const {
        if (x.ndim && x.size[0]) {
            ops_.widen[x.dtype][0]({static_cast<const char*>(x.data), x.size[0], x.size[0], nullptr, 0.0f, out});
        }
    }

    void widen_row(int dtype, const char* x, const float* gain, float eps, char* out) const {
        ops_.widen[dtype][0]({x, x_.inputs, x_.inputs, gain, eps, reinterpret_cast<float*>(out)});
    }

    // Rows of x, normed, become the columns of a panel; columns beyond the last row are zero.
    void pack_rows(int64_t panel, const Work& work) const {
        const int64_t first = panel * kPanel, n = std::min(kPanel, x_.rows - first);
        const char* rows = x_.x + first * x_.x_step;
        int64_t step = x_.x_step;
        if (work.x.get()) {
            const float* gain = x_.norm ? gain_.get() : nullptr;
            const auto eps = static_cast<float>(a_.eps);
            for (int64_t r = 0; r < n; ++r) {
                char* to = work.x.get() + r * row_bytes_;
                if (type_ == kBF16) ops_.narrow({rows + r * step, x_.inputs, 2 * steps_, gain, eps, to});
                else widen_row(a_.x.dtype, rows + r * step, gain, eps, to);
            }
            rows = work.x.get();
            step = row_bytes_;
        }
        char* out = data_.get() + panel * panel_bytes_;
        if (n < kPanel) std::memset(out, 0, static_cast<size_t>(panel_bytes_));
        ops_.transpose({rows, step, n, steps_, out, kPanel * 4});
    }

    // Rows [first, first + n) of W as a product takes them: where they lie, or in `copy`, widened or with zeros behind.
    const char* rows_of(int64_t first, int64_t n, const Scratch<char>& copy, int64_t& step) const {
        const char* w = x_.weight + first * x_.weight_step;
        step = x_.weight_step;
        if (w_in_place_) return w;
        const auto bytes = static_cast<size_t>(x_.inputs * dtype_bytes(MC_BF16));
        for (int64_t r = 0; r < n; ++r) {
            char* to = copy.get() + r * row_bytes_;
            if (type_ == kF32) {
                widen_row(a_.weight.dtype, w + r * step, nullptr, 0.0f, to);
                continue;
            }
            std::memcpy(to, w + r * step, bytes);
            std::memset(to + bytes, 0, static_cast<size_t>(row_bytes_) - bytes);
        }
        step = row_bytes_;
        return copy.get();
    }

    // Columns of a panel that are multiplied: all that hold rows of x, and what tiles or vectors take with them.
    int64_t columns_of(int64_t panel) const {
        const int64_t rows = std::min(kPanel, x_.rows - panel * kPanel);
        return matrix_tiles_ ? kPanel : (rows + kVectorColumns - 1) / kVectorColumns * kVectorColumns;
    }

    // So many bytes are fetched while `p` is multiplied.
    void fetch(Product& p, const char* next, int64_t bytes) const {
        p.next = next;
        p.next_step = (bytes + steps_ - 1) / steps_;
        if (matrix_tiles_) return;
        p.next_row = bytes / p.m;
        p.next_step = std::max((kVectorRows * p.next_row + steps_ - 1) / steps_, kLine);
    }

    // Outputs of a block, of the rows of x in a group of panels.
    void multiply(int64_t block, int64_t group, const Work& work) const {
        const int64_t first = block * block_, n = std::min(block_, x_.outputs - first);
        const int64_t begin = group * panels_ / groups_, end = (group + 1) * panels_ / groups_;
        const char* w[2];
        int64_t step = 0;
        for (int64_t h = 0; h < halves_; ++h) w[h] = rows_of(h * x_.outputs + first, n, work.w[h], step);
        // The next block, or a half of it, in as many parts as there are panels.
        const bool more = first + n < x_.outputs && w_in_place_ && (matrix_tiles_ || end - begin <= kFewPanels);
        const int64_t ahead = more ? (n * step / (end - begin) + kLine - 1) / kLine * kLine : 0;
        alignas(64) float sums[kBlock * kPanel], turned[2][kPanel * kTurnedStep];
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t columns = columns_of(panel);
            for (int64_t h = 0; h < halves_; ++h) {
                Product p{};
                p.a = w[h];
                p.a_step = step;
                p.m = n;
                p.w = data_.get() + panel * panel_bytes_;
                p.w_step = kPanel * 4;
                p.steps = steps_;
                p.c = sums;
                p.c_step = kPanel;
                p.n = columns;
                if (more) fetch(p, w[h] + n * step + (panel - begin) * ahead, ahead);
                matmul_.multiply[type_](p);
                ops_.transpose({reinterpret_cast<const char*>(sums), kPanel * 4, n, columns,
                                reinterpret_cast<char*>(turned[h]), kTurnedStep * 4});
            }
            finish(panel * kPanel, first, n, turned[0], turned[1]);
        }
    }

    // Outputs [first, first + n) of the rows of a panel.
    void finish(int64_t row, int64_t first, int64_t n, const float* y, const float* up) const {
        const int64_t end = std::min(row + kPanel, x_.rows), bytes = dtype_bytes(a_.x.dtype);
        for (; row < end; ++row, y += kTurnedStep, up += kTurnedStep) {
            FinishRow f{};
            f.y = y;
            f.bias = x_.bias ? bias_.get() + first : nullptr;
            f.up = a_.swiglu ? up : nullptr;
            f.up_bias = x_.bias && a_.swiglu ? bias_.get() + x_.outputs + first : nullptr;
            f.residual = x_.residual ? x_.residual + row * x_.residual_step + first * bytes : nullptr;
            f.n = n;
            f.out = x_.out + row * x_.out_step + first * bytes;
            ops_.finish[a_.x.dtype](f);
        }
    }

    const mc_fused_linear_args& a_;
    const Linear& x_;
    const MatmulOps& matmul_;
    const LinearOps& ops_;
    const int type_;  // of the products
    const bool matrix_tiles_;
    const int64_t steps_, panel_bytes_, row_bytes_, panels_, halves_;
    const bool x_in_place_, w_in_place_;  // rows are multiplied as they lie
    const Scratch<char> data_;
    const Scratch<float> gain_, bias_;
    int64_t threads_, block_, blocks_, groups_;
    std::vector<Work> scratch_;
};

}  // namespace

bool serves_linear_tiles(const mc_fused_linear_args& a, const Linear& x, const IsaLevel& level) {
    if (x.inputs == 0) return false;
    return x.rows > (in_matrix_tiles(a, *level.matmul) ? kFewRowsOfTiles : kFewRowsOfVectors);
}

void linear_tiles(const mc_fused_linear_args& a, const Linear& x, const IsaLevel& level, const LinearOps& ops,
                  int n_threads) {
    LinearTiles(a, x, level, ops, n_threads).run();
}

}  // namespace mc
