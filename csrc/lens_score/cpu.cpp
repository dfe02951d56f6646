// lens_score on a CPU: one stream over the entries per pass, everything of a query's size beside it. The contract:
// mc_kernels.h.
//
// Floors. A pass reads N * E elements; a read pass multiplies and adds 2 * N * E * H * Q times, a score pass
// N * E * (H * Q + J) times. At 16 fp32 multiply-adds a cycle, or 32 of bf16, the arithmetic outweighs the read of bf16
// entries from H * Q of about 10 or 20 on, so the passes are register-tiled products over tiles of entries in the cache
// (product_impl.h, pairs_impl.h), and each entry comes from memory once a pass. Weights are read once; absorbing them
// costs Q multiply-adds an element.
//
// Matrix tiles do 512 a cycle at best and about 350 with operands from the second-level cache: with H * Q = 64 that is the
// time of a read at 10 to 15 GB/s a core, so that memory and arithmetic weigh alike, and both what is fetched twice and what
// is done beside the products show. Of wide entries (E of some thousands) neither a tile and the sums stay in that cache
// together: they come from beyond it.
//
// Online softmax in units of log 2 (Milakov & Gimelshein 2018): log2 e is in the absorbed vectors.
// Runs of entries do not depend on the number of threads, and their results are merged in order: nor does the result.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "isa.h"
#include "lens.h"
#include "merge.h"
#include "net.h"
#include "pool.h"

namespace mc {
namespace {

constexpr int64_t kRun = 512;             // entries of a run, at least
constexpr int64_t kMostRuns = 16;         // bounds the memory of partial sums
constexpr int64_t kTileBytes = 1 << 20;   // of a tile of bf16
constexpr int64_t kThreadWork = 1 << 20;  // multiply-adds that are worth waking a thread for
constexpr int64_t kTasksPerThread = 4;    // evens out threads that are slowed down
constexpr double kLog2E = 1.44269504088896340736;

const LensOps& lens_ops(const RowOps& rows) {
    return ops_beside(rows, "lens_score", {lens_avx512(), lens_avx2(), lens_scalar()});
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
          threads_(default_threads(n_threads)),
          pad_(on_matrix_tiles() ? kPanel : kPad),
          tile_(tile_entries()),
          columns_(round_up(x_.vectors(), pad_)),
          sums_(x_.vectors() * round_up(x_.dims, kStrip)),
          run_(std::max(kRun, round_up((x_.entries + kMostRuns - 1) / kMostRuns, kTile))),
          runs_((x_.entries + run_ - 1) / run_),
          inverse_(x_.entries, false) {}

    void run() {
        if (x_.entries == 0) return;
        Rows z(x_.queries, x_.width);
        bring_in(z);
        for (int64_t i = 0; i < x_.passes; ++i) {
            read_pass(z, i);
            mlp(z, i);
        }
        score_pass(z);
    }

private:
    bool on_matrix_tiles() const { return matmul_ && matmul_->outruns_memory; }

    // On matrix tiles: as many as read and write the weighted sums seldom, but are still near when their weights are
    // known.
    int64_t tile_entries() const {
        if (!on_matrix_tiles()) return kTile;
        return std::min(std::max(kTileBytes / (x_.dims * 2) / kTile * kTile, kTile), kMostEntries);
    }

    // Threads for so many multiply-adds.
    int threads_for(int64_t work) const {
        return static_cast<int>(std::min<int64_t>(threads_, std::max<int64_t>(work / kThreadWork, 1)));
    }

    // body(first, end) over parts of [0, n), each a multiple of `grain` but the last.
    template <class Body>
    void split(int64_t n, int64_t grain, int64_t work, Body&& body) const {
        const int threads = threads_for(work);
        const int64_t grains = (n + grain - 1) / grain;
        const int64_t tasks = threads == 1 ? 1 : std::min(grains, threads * kTasksPerThread);
        auto part = [&](int64_t i) { body(grains * i / tasks * grain, std::min(grains * (i + 1) / tasks * grain, n)); };
        parallel_for(tasks, threads, part);
    }

    // For products with so many inputs: by matrix tiles, which take whole steps; or NULL.
    const MatmulOps* net_matmul(int64_t inputs) const {
        return on_matrix_tiles() && inputs % (2 * kTileSteps) == 0 ? matmul_ : nullptr;
    }

    // Room for rows of so many inputs as products on matrix tiles take them, nothing where there are none.
    Buffer room_for_pairs(int64_t inputs) const {
        return net_matmul(inputs) ? Buffer(panel_bytes(kBF16, inputs) / 4, false) : Buffer();
    }
    void pair(const float* x, int64_t step, int64_t inputs, const Buffer& out) const {
        if (out.get()) ops_.pair_rows(x, step, x_.queries, inputs, reinterpret_cast<char*>(out.get()));
    }

    static const char* pairs_data(const Buffer& x) { return reinterpret_cast<const char*>(x.get()); }

    // out[m] (+)= w x[m]
    void linear(const Rows& x, const Matrix& w, int64_t outputs, const Rows& out, bool add = false) const {
        Buffer fresh;
        if (add) fresh = Buffer(x.count * out.step, false);
        float* to = add ? fresh.get() : out.at(0);
        const Buffer pairs = room_for_pairs(x.size);
        pair(x.at(0), x.step, x.size, pairs);
        split(outputs, kPad, x.count * x.size * outputs, [&](int64_t first, int64_t end) {
            const Linear l{x.at(0),     x.step,     x.count,  w.row(first),       w.step,           x.size,
                           end - first, to + first, out.step, net_matmul(x.size), pairs_data(pairs)};
            ops_.linear[x_.weight_dtype](l);
        });
        for (int64_t m = 0; add && m < x.count; ++m) {
            for (int64_t i = 0; i < outputs; ++i) out.at(m)[i] += to[m * out.step + i];
        }
    }

    Rows widened(const mc_tensor& x, int dtype, int64_t rows, int64_t size) const {
        Rows out(rows, size);
        const Matrix m = x.ndim == 1 ? Matrix{static_cast<const char*>(x.data), 0} : matrix(x);
        for (int64_t i = 0; i < rows && size; ++i) ops_.widen[dtype](m.row(i), size, out.at(i));
        return out;
    }

    Rows normed(const Rows& x, const mc_tensor& gains, int64_t pass) const {
        Rows gain(1, x.size);
        const int64_t skip = gains.ndim == 2 ? pass * bytes_to(gains, 0) : 0;
        ops_.widen[x_.weight_dtype](static_cast<const char*>(gains.data) + skip, x.size, gain.at(0));
        return mc::normed(x, gain.at(0));
    }

    void bring_in(const Rows& z) const {
        linear(mc::normed(widened(a_.queries, x_.dtype, x_.queries, x_.dims), nullptr), matrix(a_.w_in), x_.width, z);
    }

    // The vectors [H * Q, E] that meet the entries: those of head h are w[h]^T q[h] / sqrt(d/H), in units of log 2.
    void absorb(const Rows& q, const Matrix& w, const Rows& out) const {
        const int64_t per_head = x_.head_dim();
        const float scale = static_cast<float>(kLog2E / std::sqrt(static_cast<double>(per_head)));
        for (int64_t i = 0; i < q.count * q.step; ++i) q.at(0)[i] *= scale;
        const int64_t element = dtype_bytes(x_.weight_dtype);
        split(x_.dims, kStrip, q.count * x_.width * x_.dims, [&](int64_t first, int64_t end) {
            for (int64_t h = 0; h < x_.heads; ++h) {
                const Absorb one{q.at(0) + h * per_head,
                                 q.step,
                                 x_.queries,
                                 w.row(h * per_head) + first * element,
                                 w.step,
                                 per_head,
                                 end - first,
                                 out.at(h * x_.queries) + first,
                                 out.step,
                                 x_.dims % (2 * kTileSteps) ? nullptr : net_matmul(per_head)};
                ops_.absorb[x_.weight_dtype](one);
            }
        });
    }

    // What the entries meet: rows that become the columns of a panel, [E, columns] in fp32 or packed in bf16.
    Buffer panel_of(const Rows& rows, int64_t columns) const {
        const int64_t panels = panels_of(rows.count), work = rows.count * x_.dims;
        Buffer panel(matmul_ ? panels * panel_bytes(kBF16, x_.dims) / 4 : x_.dims * columns);
        if (matmul_) {
            const Scratch<char> narrow(rows.count * x_.dims * 2);  // before threads start, which must not throw
            split(panels, 1, work,
                  [&](int64_t first, int64_t end) { pack_pairs(ops_, rows, first, end, narrow.get(), panel.get()); });
        } else {
            split(x_.dims, kPad, work,
                  [&](int64_t first, int64_t end) { turn(rows, columns, first, end, panel.get()); });
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
        const int threads = threads_for(work);
        const int64_t tasks = threads == 1 ? 1 : std::min(runs_, threads * kTasksPerThread);
        const Buffer scratch(tasks * floats, false);
        auto task = [&](int64_t i) {
            for (int64_t r = i * runs_ / tasks; r < (i + 1) * runs_ / tasks; ++r) body(r, scratch.get() + i * floats);
        };
        parallel_for(tasks, threads, task);
    }

    void read_pass(const Rows& z, int64_t pass) const {
        Rows q(x_.queries, x_.width), vectors(x_.vectors(), x_.dims, kStrip);
        linear(normed(z, a_.read_norm, pass), matrix(a_.read_q, pass), x_.width, q);
        absorb(q, matrix(a_.read_k, pass), vectors);
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
        split(x_.dims, kStrip, runs_ * sums_,
              [&](int64_t first, int64_t end) { merge_runs(found, ops_, first, end, vectors); });
        apply_values(z, vectors, pass);
    }

    // z += read_out concat_h(read_v[h] context[h, m])
    void apply_values(const Rows& z, const Rows& context, int64_t pass) const {
        const Rows values(x_.queries, x_.width);
        const Matrix w = matrix(a_.read_v, pass);
        const int64_t per_head = x_.head_dim();
        std::vector<Buffer> pairs;
        for (int64_t h = 0; h < x_.heads; ++h) pairs.push_back(room_for_pairs(x_.dims));
        split(x_.heads, 1, x_.vectors() * x_.dims * 8, [&](int64_t first, int64_t end) {
            for (int64_t h = first; h < end; ++h) {
                pair(context.at(h * x_.queries), context.step, x_.dims, pairs[static_cast<size_t>(h)]);
            }
        });
        split(x_.width, 1, x_.queries * x_.width * x_.dims, [&](int64_t first, int64_t end) {
            for (int64_t at = first; at < end;) {
                const int64_t h = at / per_head, stop = std::min(end, (h + 1) * per_head);
                const Linear l{context.at(h * x_.queries),
                               context.step,
                               x_.queries,
                               w.row(at),
                               w.step,
                               x_.dims,
                               stop - at,
                               values.at(0) + at,
                               values.step,
                               net_matmul(x_.dims),
                               pairs_data(pairs[static_cast<size_t>(h)])};
                ops_.linear[x_.weight_dtype](l);
                at = stop;
            }
        });
        linear(values, matrix(a_.read_out, pass), x_.width, z, true);
    }

    void mlp(const Rows& z, int64_t pass) const {
        Rows both(x_.queries, 2 * x_.ffn), hidden(x_.queries, x_.ffn);
        linear(normed(z, a_.mlp_norm, pass), matrix(a_.mlp_gate_up, pass), 2 * x_.ffn, both);
        for (int64_t m = 0; m < x_.queries; ++m) {
            const float *gate = both.at(m), *up = gate + x_.ffn;
            for (int64_t i = 0; i < x_.ffn; ++i) hidden.at(m)[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
        }
        linear(hidden, matrix(a_.mlp_down, pass), x_.width, z, true);
    }

    void score_pass(const Rows& z) const {
        const int64_t used = x_.vectors() + x_.direct, columns = round_up(used, pad_);
        const Rows s = normed(z, a_.score_norm, 0), values(x_.queries, x_.heads * x_.head_values);
        Rows keys(x_.queries, x_.width), vectors(used, x_.dims, kStrip);
        linear(s, matrix(a_.score_k), x_.width, keys);
        linear(s, matrix(a_.score_v), x_.heads * x_.head_values, values);
        absorb(keys, matrix(a_.score_q), vectors);
        const Matrix direct = matrix(a_.direct);
        for (int64_t j = 0; j < x_.direct; ++j) {
            ops_.widen[x_.weight_dtype](direct.row(j), x_.dims, vectors.at(x_.vectors() + j));
        }
        const Buffer panel = panel_of(vectors, columns), turned(x_.vectors() * x_.head_values);
        for (int64_t i = 0; i < x_.heads * x_.head_values; ++i) {
            for (int64_t m = 0; m < x_.queries; ++m) turned.get()[i * x_.queries + m] = values.at(m)[i];
        }
        const int dtype = x_.weight_dtype;
        const Rows in = widened(a_.head_in, dtype, x_.hidden, x_.inputs),
                   out = widened(a_.head_out, dtype, 2, x_.hidden);
        const Rows in_bias = widened(a_.head_bias, dtype, 1, x_.hidden),
                   out_bias = widened(a_.head_out_bias, dtype, 1, 2);
        const int64_t in_pairs_step = twice_bytes(x_.inputs);
        const Buffer in_pairs = on_matrix_tiles() ? twice(matrix(a_.head_in), x_.hidden, x_.inputs) : Buffer();
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
    const int threads_;
    const int64_t pad_, tile_, columns_, sums_, run_, runs_;
    const Buffer inverse_;  // [N] 1 / rms of the entries
};

}  // namespace
}  // namespace mc

extern "C" int32_t mc_lens_score_cpu(const mc_lens_score_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        mc::Call(*args, n_threads).run();
    });
}
