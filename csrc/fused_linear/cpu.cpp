// fused_linear on a CPU for a handful of rows of x: one stream over the weight (many: tiles.cpp). The contract: mc_kernels.h.
//
// Floor. W is read once: O * E * sizeof(dtype) bytes over the read bandwidth; the rest is small beside it. So:
// - One row of x reads W row by row, as it lies; more of them a few rows at a time, with the next ones fetched ahead
//   (fetch.h): reading rows side by side without that runs at half the bandwidth.
// - Each vector of W is widened to fp32 once for up to four rows of x, which lie widened (and normed) in the caches.
//   Rows of W that more rows of x need are read again from the first-level cache, not from memory. Where a level
//   multiplies bf16 and x and W are bf16, nothing is widened: pairs_impl.h.
// - A few rows of bf16 or fp32 may read the weight packed in codes of 4 or 8 bits, three or five eighths of the bytes of
//   bf16: packed_impl.h.
// - Sums across a register are done for a whole vector of outputs at a time.
// - Norm, bias, activation and residual are done where the data is: no tensor between them goes through memory.
//
// An output is the sum of the same products in the same order whoever computes it, so the result does not depend on the
// number of threads, nor on how many other rows x has.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "choice.h"
#include "isa.h"
#include "packed.h"
#include "pool.h"
#include "tiles.h"

namespace mc {
namespace {

constexpr int64_t kThreadBytes = 1 << 16;  // of weights that are worth waking a thread for
constexpr int64_t kSmallTasks = 2;         // a thread: what evens out threads that are slowed down
constexpr int64_t kUnit = 16;              // outputs: tasks begin at whole vectors

class Floats {
public:
    explicit Floats(int64_t n) : lines_(static_cast<size_t>((n + 15) / 16)) {}
    float* get() { return lines_.empty() ? nullptr : lines_.front().f; }

private:
    struct alignas(64) Line {
        float f[16];
    };
    std::vector<Line> lines_;
};

bool reads_packed(const mc_fused_linear_args& a, const Linear& x, const LinearOps& ops) {
    if (!a.packed.data || a.x.dtype != a.weight.dtype) return false;
    return x.rows <= ops.packed_rows[a.packed.bits == 8];
}

class Call {
public:
    Call(const mc_fused_linear_args& a, const Linear& x, const LinearOps& ops, int n_threads)
        : a_(a),
          x_(x),
          ops_(ops),
          in_pairs_(ops_.dot_pairs && a.x.dtype == MC_BF16 && a.weight.dtype == MC_BF16),
          packed_(reads_packed(a, x, ops)),
          planes_(a.x.dtype == MC_BF16 ? 2 : 3),
          blocks_(packed_ ? x_.inputs / kPackedBlock : 0),
          padded_((x_.inputs + kSpan - 1) / kSpan * kSpan),
          ready_x_(in_pairs_ && !packed_ ? x_.rows * padded_ / 2 : x_.rows * padded_),
          scales_(x_.rows * blocks_),
          sums_(x_.rows * blocks_),
          gain_(x_.norm ? x_.inputs : 0),
          bias_(x_.bias ? a.weight.size[0] : 0) {
        const int64_t row = packed_ ? packed_step() / kPackedRows : x_.inputs * dtype_bytes(a.weight.dtype);
        const int64_t bytes = a.weight.size[0] * row;
        threads_ = std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(bytes / kThreadBytes, 1));
    }

    void run() {
        make_ready();
        const int64_t units = (x_.outputs + kUnit - 1) / kUnit;
        // A long stream for each thread, since every task begins with misses; and short ones, for who is done first.
        const int64_t tasks = threads_ == 1 ? 1 : threads_ * (1 + kSmallTasks), large = threads_;
        const int64_t share = tasks == large ? units : units - units / 5;
        auto begin_of = [&](int64_t i) {
            return i <= large ? i * share / large : share + (i - large) * (units - share) / (tasks - large);
        };
        auto body = [&](int64_t i) {
            const int64_t end = std::min(begin_of(i + 1) * kUnit, x_.outputs);
            for (int64_t first = begin_of(i) * kUnit; first < end; first += kColumns) {
                columns(first, std::min(kColumns, end - first));
            }
        };
        parallel_for(tasks, static_cast<int>(threads_), body);
    }

private:
    void widen_vector(const mc_tensor& x, Floats& out) {
        if (x.ndim && x.size[0]) {
            ops_.widen[x.dtype][0]({static_cast<const char*>(x.data), x.size[0], x.size[0], nullptr, 0.0f, out.get()});
        }
    }

    void make_ready() {
        widen_vector(a_.norm, gain_);
        widen_vector(a_.bias, bias_);
        const float* gain = x_.norm ? gain_.get() : nullptr;
        const float eps = static_cast<float>(a_.eps);
        if (packed_) packed_ = make_bytes(gain, eps);
        for (int64_t r = 0; r < x_.rows && !packed_; ++r) {
            const char* x = x_.x + r * x_.x_step;
            if (in_pairs_) {
                ops_.narrow({x, x_.inputs, padded_, gain, eps, pairs(r)});
            } else {
                const int even_first = a_.weight.dtype == MC_BF16;
                ops_.widen[a_.x.dtype][even_first]({x, x_.inputs, padded_, gain, eps, ready_x_.get() + r * padded_});
            }
        }
    }

    // False: x has an infinity or a NaN, of which the weight makes what it should.
    bool make_bytes(const float* gain, float eps) {
        Floats row(padded_);
        for (int64_t r = 0; r < x_.rows; ++r) {
            ops_.widen[a_.x.dtype][0]({x_.x + r * x_.x_step, x_.inputs, padded_, gain, eps, row.get()});
            const int64_t block = r * blocks_;
            const bool numbers = ops_.to_bytes(
                {row.get(), x_.inputs, planes_, a_.packed.bits, bytes(r), scales_.get() + block, sums_.get() + block});
            if (!numbers) return false;
        }
        return true;
    }

    int64_t packed_step() const { return x_.inputs / kPackedBlock * packed_block_bytes(a_.packed.bits); }
    int64_t bytes_step() const { return blocks_ * planes_ * kPlaneBytes; }
    char* bytes(int64_t row) { return reinterpret_cast<char*>(ready_x_.get()) + row * bytes_step(); }
    int64_t pairs_step() const { return padded_ * 2; }
    char* pairs(int64_t row) { return reinterpret_cast<char*>(ready_x_.get()) + row * pairs_step(); }

    // Outputs [first, first + n) of all rows of x, n at most kColumns.
    void columns(int64_t first, int64_t n) {
        alignas(64) float y[kXRows * kColumns], up[kXRows * kColumns];
        const int64_t bytes = dtype_bytes(a_.x.dtype);
        for (int64_t r = 0; r < x_.rows; r += kXRows) {
            const int64_t rows = std::min(kXRows, x_.rows - r);
            const int64_t up_row = x_.outputs + first;
            dot(first, n, a_.swiglu ? up_row : first + n, r, rows, y);
            if (a_.swiglu) dot(up_row, n, first + n, r, rows, up);
            for (int64_t i = 0; i < rows; ++i) {
                FinishRow row{};
                row.y = y + i * kColumns;
                row.bias = x_.bias ? bias_.get() + first : nullptr;
                row.up = a_.swiglu ? up + i * kColumns : nullptr;
                row.up_bias = x_.bias && a_.swiglu ? bias_.get() + x_.outputs + first : nullptr;
                row.residual = x_.residual ? x_.residual + (r + i) * x_.residual_step + first * bytes : nullptr;
                row.n = n;
                row.out = x_.out + (r + i) * x_.out_step + first * bytes;
                ops_.finish[a_.x.dtype](row);
            }
        }
    }

    void dot(int64_t row, int64_t n, int64_t next, int64_t x_row, int64_t x_rows, float* out) {
        const char *w = x_.weight + row * x_.weight_step, *then = x_.weight + next * x_.weight_step;
        if (packed_) {
            // Tasks, columns and the halves of swiglu begin at whole groups of rows.
            const auto* packed = static_cast<const char*>(a_.packed.data) + row / kPackedRows * packed_step();
            const auto* next_packed = static_cast<const char*>(a_.packed.data) + next / kPackedRows * packed_step();
            ops_.dot_packed({packed, next_packed, fetch_, a_.packed.bits, n, x_.inputs, bytes(x_row), planes_, x_rows, bytes_step(),
                             scales_.get(), sums_.get(), out});
        } else if (in_pairs_) {
            ops_.dot_pairs({w, then, x_.weight_step, n, x_.inputs, pairs(x_row), x_rows, pairs_step(), out, fetch_});
        } else {
            ops_.dot[a_.weight.dtype]({w, then, x_.weight_step, n, x_.inputs, ready_x_.get() + x_row * padded_, x_rows,
                                       padded_, out, fetch_});
        }
    }

    const mc_fused_linear_args& a_;
    const Linear& x_;
    const LinearOps& ops_;
    const bool in_pairs_;
    bool packed_;  // is read in place of the weight
    const int planes_;
    const bool fetch_ = streams_want_fetches();
    const int64_t blocks_, padded_;
    Floats ready_x_, scales_, sums_, gain_, bias_;  // [N, padded] (of 2 or 3 bytes), [N, E / 32] twice, [E], [O]
    int64_t threads_;
};

}  // namespace
}  // namespace mc

extern "C" int32_t mc_fused_linear_cpu(const mc_fused_linear_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        const mc::Linear x = mc::check_fused_linear(*args);
        const mc::IsaLevel& level = mc::isa_level();
        if (x.rows == 0 || x.outputs == 0) return;  // the other of the two may be more than there is memory for
        const mc::LinearOps& ops = mc::linear_ops(level, "fused_linear");
        if (!mc::reads_packed(*args, x, ops) && mc::serves_linear_tiles(*args, x, level)) {
            return mc::linear_tiles(*args, x, level, ops, n_threads);
        }
        mc::Call(*args, x, ops, n_threads).run();
    });
}
