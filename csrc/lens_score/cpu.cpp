// lens_score on a CPU: one stream over the entries per pass, everything of a query's size beside it (query_net.cpp).
// The contract: mc_kernels.h.
//
// Floors. A pass reads N * E elements; a read pass multiplies and adds 2 * N * E * H * Q times, a score pass
// N * E * (H * Q + J) times. At 16 fp32 multiply-adds a cycle, or 32 of bf16, the arithmetic outweighs the read of bf16
// entries from H * Q of about 10 or 20 on, so the passes are register-tiled products over tiles of entries in the cache
// (product_impl.h, pairs_impl.h), and each entry comes from memory once a pass.
//
// Matrix tiles do 512 a cycle at best and about 350 with operands from the second-level cache: with H * Q = 64 that is the
// time of a read at 10 to 15 GB/s a core, so that memory and arithmetic weigh alike, and both what is fetched twice and what
// is done beside the products show. Of wide entries (E of some thousands) neither a tile and the sums stay in that cache
// together: they come from beyond it.
//
// Online softmax in units of log 2 (Milakov & Gimelshein 2018): log2 e is in the absorbed vectors.
// Runs of entries do not depend on the number of threads, and their results are merged in order: nor does the result.
#include <algorithm>

#include "check.h"
#include "isa.h"
#include "lens.h"
#include "merge.h"
#include "net.h"
#include "query_net.h"
#include "team.h"

namespace mc {
namespace {

constexpr int64_t kRun = 512;            // entries of a run, at least
constexpr int64_t kMostRuns = 16;        // bounds the memory of partial sums
constexpr int64_t kTileBytes = 1 << 20;  // of a tile of bf16

const LensOps& lens_ops(const RowOps& rows) {
    return ops_beside(rows, "lens_score", {lens_avx512(), lens_avx2(), lens_neon(), lens_scalar()});
}

class Call {
public:
    Call(const mc_lens_score_args& a, int n_threads)
        : a_(a),
          x_(check_lens_score(a)),
          level_(isa_level()),
          ops_(lens_ops(*level_.rows)),
          matmul_(x_.dtype == kBF16 && x_.weight_dtype == kBF16 && level_.matmul->multiply[kBF16] ? level_.matmul
                                                                                                  : nullptr),
          threads_{default_threads(n_threads)},
          net_(a_, x_, ops_, matmul_, threads_),
          pad_(on_matrix_tiles(matmul_) ? kPanel : kPad),
          tile_(tile_entries()),
          columns_(round_up(x_.vectors(), pad_)),
          sums_(x_.vectors() * round_up(x_.dims, kStrip)),
          run_(std::max(kRun, round_up((x_.entries + kMostRuns - 1) / kMostRuns, kTile))),
          runs_((x_.entries + run_ - 1) / run_),
          inverse_(x_.entries, false) {}

    // What its largest job is worth.
    int threads() const { return threads_.worth(2 * x_.entries * x_.dims * x_.vectors()); }

    void run() {
        if (x_.entries == 0) return;
        const Rows z = net_.bring_in();
        for (int64_t i = 0; i < x_.passes; ++i) {
            read_pass(z, i);
            net_.mlp(z, i);
        }
        score_pass(z);
    }

private:
    // On matrix tiles: as many as read and write the weighted sums seldom, but are still near when their weights are
    // known.
    int64_t tile_entries() const {
        if (!on_matrix_tiles(matmul_)) return kTile;
        return std::min(std::max(kTileBytes / (x_.dims * 2) / kTile * kTile, kTile), kMostEntries);
    }

    static const char* pairs_data(const Buffer& x) { return reinterpret_cast<const char*>(x.get()); }

    // What the entries meet: rows that become the columns of a panel, [E, columns] in fp32 or packed in bf16.
    Buffer panel_of(const Rows& rows, int64_t columns) const {
        const int64_t panels = panels_of(rows.count), work = rows.count * x_.dims;
        Buffer panel(matmul_ ? panels * panel_bytes(kBF16, x_.dims) / 4 : x_.dims * columns);
        if (matmul_) {
            const Scratch<char> narrow(rows.count * x_.dims * 2);  // before threads start, which must not throw
            threads_.split(panels, 1, work, [&](int64_t first, int64_t end) {
                pack_pairs(ops_, rows, first, end, narrow.get(), panel.get());
            });
        } else {
            threads_.split(x_.dims, kPad, work, [&](int64_t first, int64_t end) {
                turn(rows, columns, first, end, panel.get());
            });
        }
        return panel;
    }

    Stream stream(const Buffer& panel, int64_t columns, int64_t run, float* scratch, bool first_pass) const {
        const Matrix entries = matrix(a_.entries);
        const int64_t first = run * run_;
        return {entries.row(first),
                entries.step,
                std::min(run_, x_.entries - first),
                x_.dims,
                panel.get(),
                columns,
                tile_,
                scratch,
                inverse_.get() + first,
                first_pass,
                matmul_,
                matmul_ ? reinterpret_cast<const char*>(panel.get()) : nullptr};
    }

    // body(run, scratch) for every run, with so many floats of scratch.
    template <class Body>
    void each_run(int64_t floats, int64_t work, Body&& body) const {
        const int threads = threads_.worth(work);
        const int64_t tasks = threads == 1 ? 1 : std::min(runs_, threads * Threads::kTasksPerThread);
        const Buffer scratch(tasks * floats, false);
        auto task = [&](int64_t i) {
            for (int64_t r = i * runs_ / tasks; r < (i + 1) * runs_ / tasks; ++r) body(r, scratch.get() + i * floats);
        };
        parallel_for(tasks, threads, task);
    }

    void read_pass(const Rows& z, int64_t pass) const {
        const Rows vectors(x_.vectors(), x_.dims, kStrip);
        net_.read_vectors(z, pass, vectors);
        const Buffer panel = panel_of(vectors, columns_);
        const Buffer sums(runs_ * sums_, false), top(runs_ * columns_), total(runs_ * columns_);
        const int64_t work = 2 * x_.entries * x_.dims * x_.vectors();
        each_run(stream_floats(columns_, tile_), work, [&](int64_t r, float* scratch) {
            const ReadRun one{stream(panel, columns_, r, scratch, pass == 0), x_.vectors(), top.get() + r * columns_,
                              total.get() + r * columns_, sums.get() + r * sums_};
            ops_.read[x_.dtype](one);
        });
        const Runs found{runs_, columns_, sums_, top.get(), total.get(), sums.get()};
        weigh_runs(found, x_.vectors());
        threads_.split(x_.dims, kStrip, runs_ * sums_, [&](int64_t first, int64_t end) {
            merge_runs(found, ops_, first, end, vectors);
        });
        net_.apply_values(z, vectors, pass);
    }

    void score_pass(const Rows& z) const {
        const int64_t used = x_.vectors() + x_.direct, columns = round_up(used, pad_);
        const Rows vectors(used, x_.dims, kStrip), values(x_.queries, x_.heads * x_.head_values);
        net_.score_vectors(z, vectors, values);
        const Buffer panel = panel_of(vectors, columns), turned(x_.vectors() * x_.head_values);
        for (int64_t i = 0; i < x_.heads * x_.head_values; ++i) {
            for (int64_t m = 0; m < x_.queries; ++m) turned.get()[i * x_.queries + m] = values.at(m)[i];
        }
        const Rows in = net_.widened(a_.head_in, x_.hidden, x_.inputs), out = net_.widened(a_.head_out, 2, x_.hidden);
        const Rows in_bias = net_.widened(a_.head_bias, 1, x_.hidden), out_bias = net_.widened(a_.head_out_bias, 1, 2);
        const int64_t in_pairs_step = twice_bytes(x_.inputs);
        const Buffer in_pairs = on_matrix_tiles(matmul_) ? twice(matrix(a_.head_in), x_.hidden, x_.inputs) : Buffer();
        const Head head{x_.heads,  x_.queries,   x_.head_values, x_.direct,     x_.features,          x_.hidden,
                        x_.inputs, turned.get(), in.at(0),       in.step,       pairs_data(in_pairs), in_pairs_step,
                        out.at(0), out.step,     in_bias.at(0),  out_bias.at(0)};
        const int64_t work = x_.entries * (x_.dims * used + x_.hidden * x_.inputs);
        each_run(score_floats(head, columns, tile_), work, [&](int64_t r, float* scratch) {
            const int64_t first = r * run_;
            const ScoreRun one{stream(panel, columns, r, scratch, x_.passes == 0),
                               &head,
                               matrix(a_.features).row(first),
                               bytes_to(a_.features, 0),
                               a_.legal ? a_.legal + 2 * first : nullptr,
                               static_cast<char*>(a_.out.data) + first * bytes_to(a_.out, 0),
                               bytes_to(a_.out, 0)};
            ops_.score[x_.dtype](one);
        });
    }

    const mc_lens_score_args& a_;
    const Lens x_;
    const IsaLevel& level_;
    const LensOps& ops_;
    const MatmulOps* const matmul_;  // NULL: no bf16 products
    const Threads threads_;
    const QueryNet net_;
    const int64_t pad_, tile_, columns_, sums_, run_, runs_;
    const Buffer inverse_;  // [N] 1 / rms of the entries
};

}  // namespace
}  // namespace mc

extern "C" int32_t mc_lens_score_cpu(const mc_lens_score_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        mc::Call call(*args, n_threads);
        mc::with_team(call.threads(), [&] { call.run(); });
    });
}
