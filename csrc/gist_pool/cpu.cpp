// gist_pool and collapse on a CPU. The contract: mc_kernels.h.
//
// Floor. Of a block, K entries of 2 * D elements are read once. The residual's M has 4 * D * D elements, which is
// 2 * D / K blocks (4 for D = 64 and K = 32, 8 for D = 128): with one block a head M is most of the traffic, with many
// it is read once and the product is most of the arithmetic: 4 * D * D fused operations a block next to 6 * K * D for
// norms, logits and the weighted sum, which is 1.3 and 2.7 times as much. The floor is the greater of bytes over read
// bandwidth and of operations over their rate.
//
// - A block is read from memory for its logits; the weighted sum finds it in the first-level cache (or the second: 8 to
//   32 KB). While that runs, the next block is fetched.
// - Blocks of a head go through M in groups, tiles of which share the loads of M. A group is small, so that fetches do
//   not pause for long, and M comes from the second-level cache after the first.
// - A collapse pools all blocks of a lane, (layer, sequence, head), before it writes: lanes share no memory, so threads
//   need no order among them.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "isa.h"
#include "pool.h"

namespace mc {
namespace {

constexpr int64_t kGroup = 12;             // blocks that go through M together: tiles of kTileRows
// Up to here M is multiplied in bf16. Above, one block a head, which is bound by the read of M, ran 5 to 10% slower so.
// Not by the number of blocks: a gist does not depend on what is pooled beside it.
constexpr int64_t kMostPairDims = 64;
constexpr int64_t kThreadBytes = 1 << 18;  // read, that are worth waking a thread for
constexpr int64_t kTasksPerThread = 4;     // evens out threads that are slowed down

const GistOps& gist_ops() {
    return ops_of(isa_level(), "gist_pool", {gist_avx512bf16(), gist_avx512(), gist_avx2(), gist_neon(), gist_scalar()});
}

// What a task needs beside its arguments: weights of the head at hand and a group of gists.
class Worker {
public:
    Worker(const Pooling& x, const GistOps& ops, int64_t k_step, int64_t v_step)
        : x_(x),
          ops_(ops),
          in_pairs_(ops.pool_pairs && x.dtype == kBF16 && x.weights_dtype == kBF16 && x.dims % kPairDims == 0),
          k_step_(k_step),
          v_step_(v_step),
          step_(gist_step(x.dims)) {
        const int64_t entries = padded(x.count), part = 2 * padded(x.dims);
        const int64_t sizes[7] = {x.gists * part, x.gists * entries, padded(x.width()), (x.gists + 1) * entries,
                                  kGroup * x.gists * step_, kGroup * x.gists * step_,
                                  in_pairs_ ? kGroup * x.gists * step_ / 2 : 0};
        int64_t total = 0;
        for (int64_t n : sizes) total += n;
        memory_.assign(static_cast<size_t>(total), 0.0f);
        float* parts[7] = {memory_.data()};
        for (int i = 1; i < 7; ++i) parts[i] = parts[i - 1] + sizes[i - 1];
        w_ = parts[0];
        b_ = parts[1];
        c_ = parts[2];
        scores_ = parts[3];
        y_ = parts[4];
        out_ = parts[5];
        pairs_ = reinterpret_cast<uint16_t*>(parts[6]);
    }

    void select(int64_t layer, int64_t head) {
        if (layer == layer_ && head == head_) return;
        layer_ = layer;
        head_ = head;
        const auto widen = ops_.widen[x_.weights_dtype];
        const int64_t entries = padded(x_.count), part = padded(x_.dims);
        for (int64_t g = 0; g < x_.gists; ++g) {
            float* b = b_ + g * entries;
            widen(x_.b + layer * x_.b_stride[0] + head * x_.b_stride[1] + g * x_.b_stride[2], x_.count, b);
            std::fill(b + x_.count, b + entries, -std::numeric_limits<float>::infinity());
            if (in_pairs_) continue;
            widen(x_.w + layer * x_.w_stride[0] + head * x_.w_stride[1] + g * x_.w_stride[2], x_.width(), out_);
            ops_.arrange[x_.dtype](out_, x_.dims, w_ + g * 2 * part);
            ops_.arrange[x_.dtype](out_ + x_.dims, x_.dims, w_ + g * 2 * part + part);
        }
        widen(x_.c + layer * x_.c_stride[0] + head * x_.c_stride[1], x_.width(), c_);
        m_ = x_.m + layer * x_.m_stride[0] + head * x_.m_stride[1];
        w_pairs_ = x_.w + layer * x_.w_stride[0] + head * x_.w_stride[1];
        fresh_ = true;
    }

    // Gists of n <= kGroup blocks with the selected weights. at(i): block i's rows, i <= n; those of n are what comes
    // next, or none.
    template <class At>
    void pool(int64_t n, At&& at) {
        BlockRows next = at(0);
        for (int64_t i = 0; i < n; ++i) {
            const BlockRows rows = next;
            next = at(i + 1);
            const PoolBlock block{rows,     next, k_step_, v_step_, x_.count, x_.dims,
                                  x_.gists, w_,   b_,      scores_, y_ + i * x_.gists * step_,
                                  w_pairs_, x_.w_stride[2]};
            (in_pairs_ ? ops_.pool_pairs : ops_.pool[x_.dtype])(block);
        }
        const Residual all{y_, m_, x_.m_stride[2], c_, n * x_.gists, x_.width(), step_, out_, fresh_, pairs_};
        const bool narrow = in_pairs_ && x_.dims <= kMostPairDims;
        (narrow ? ops_.residual_pairs : ops_.residual[x_.weights_dtype])(all);
        fresh_ = false;
    }

    // Gist i of the group, counted over its blocks, to a key and a value.
    void write(int64_t i, char* k, char* v) const {
        ops_.store[x_.dtype](out_ + i * step_, x_.dims, k);
        ops_.store[x_.dtype](out_ + i * step_ + x_.dims, x_.dims, v);
    }

private:
    const Pooling& x_;
    const GistOps& ops_;
    bool in_pairs_, fresh_ = false;
    int64_t k_step_, v_step_, step_, layer_ = -1, head_ = -1;
    std::vector<float> memory_;
    float *w_, *b_, *c_, *scores_, *y_, *out_;
    uint16_t* pairs_;
    const char *m_ = nullptr, *w_pairs_ = nullptr;
};

// run(worker, first, end) over runs of `units` pieces of work that read `bytes` altogether. Workers are made before
// anything is written, so that a call that lacks memory changes nothing.
template <class Run, class Make>
void each_run(int64_t units, int64_t bytes, int n_threads, Make&& make, Run&& run) {
    const int64_t threads = std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(bytes / kThreadBytes, 1));
    const int64_t tasks = threads == 1 ? 1 : std::min(units, threads * kTasksPerThread);
    using Task = decltype(make());
    std::vector<Task> workers;
    workers.reserve(static_cast<size_t>(tasks));
    for (int64_t i = 0; i < tasks; ++i) workers.push_back(make());
    auto body = [&](int64_t i) { run(workers[static_cast<size_t>(i)], i * units / tasks, (i + 1) * units / tasks); };
    parallel_for(tasks, static_cast<int>(threads), body);
}

// Bytes of M in all layers and heads, and of `blocks` blocks.
int64_t read_bytes(const Pooling& x, int64_t blocks) {
    return x.layers * x.heads * x.width() * x.width() * dtype_bytes(x.weights_dtype) +
           blocks * x.count * 2 * x.row_bytes();
}

void gist_pool(const mc_gist_pool_args& a, int n_threads) {
    const GistOps& ops = gist_ops();
    const Pooling x = check_gist_pool(a);
    const int64_t batch = a.k.size[0] / x.layers, blocks = a.k.size[2], per_head = batch * blocks;
    if (per_head == 0 || x.heads == 0) return;
    int64_t k[4], v[4], k_out[4], v_out[4];
    byte_strides(a.k, 4, k);
    byte_strides(a.v, 4, v);
    byte_strides(a.k_gist, 4, k_out);
    byte_strides(a.v_gist, 4, v_out);
    std::vector<int64_t> slots(static_cast<size_t>(x.count));
    for (int64_t j = 0; j < x.count; ++j) slots[static_cast<size_t>(j)] = j;

    // Block q of those of a layer and head.
    auto offset = [&](const int64_t* stride, int64_t layer, int64_t head, int64_t q) {
        return (layer * batch + q / blocks) * stride[0] + head * stride[1] + q % blocks * stride[2];
    };
    const char *k_data = static_cast<const char*>(a.k.data), *v_data = static_cast<const char*>(a.v.data);
    char *k_gist = static_cast<char*>(a.k_gist.data), *v_gist = static_cast<char*>(a.v_gist.data);
    const int64_t groups = (per_head + kGroup - 1) / kGroup, units = x.layers * x.heads * groups;
    auto run = [&](Worker& worker, int64_t first, int64_t end) {
        for (int64_t u = first; u < end; ++u) {
            const int64_t head = u / groups % x.heads, layer = u / groups / x.heads, q = u % groups * kGroup;
            const int64_t n = std::min(kGroup, per_head - q);
            worker.select(layer, head);
            worker.pool(n, [&](int64_t i) -> BlockRows {
                if (i < n) {
                    return {k_data + offset(k, layer, head, q + i), v_data + offset(v, layer, head, q + i),
                            slots.data()};
                }
                if (u + 1 == end) return {};
                const int64_t next = (u + 1) / groups;
                const int64_t at = (u + 1) % groups * kGroup;
                return {k_data + offset(k, next / x.heads, next % x.heads, at),
                        v_data + offset(v, next / x.heads, next % x.heads, at), slots.data()};
            });
            for (int64_t i = 0; i < n * x.gists; ++i) {
                const int64_t g = i % x.gists, block = q + i / x.gists;
                worker.write(i, k_gist + offset(k_out, layer, head, block) + g * k_out[3],
                             v_gist + offset(v_out, layer, head, block) + g * v_out[3]);
            }
        }
    };
    auto make = [&] { return Worker(x, ops, k[3], v[3]); };
    each_run(units, read_bytes(x, x.layers * x.heads * per_head), n_threads, make, run);
}

// Segments within one lane.
void move(char* lane, int64_t step, int64_t row_bytes, const int64_t* s, int64_t n) {
    for (int64_t i = 0; i < n; ++i, s += 3) {
        const char* from = lane + s[0] * step;
        char* to = lane + s[1] * step;
        if (step == row_bytes) {
            std::memmove(to, from, static_cast<size_t>(s[2] * step));
            continue;
        }
        for (int64_t j = 0; j < s[2]; ++j) {
            const int64_t row = (s[1] <= s[0] ? j : s[2] - 1 - j) * step;
            std::memcpy(to + row, from + row, static_cast<size_t>(row_bytes));
        }
    }
}

struct Collapser {
    Worker worker;
    std::vector<char> gists;  // of a lane, (key, value) each
};

void collapse(const mc_collapse_args& a, int n_threads) {
    const GistOps& ops = gist_ops();
    const Pooling x = check_collapse(a);
    const int64_t batch = a.k.size[1], lanes = x.layers * x.heads * batch, row = x.row_bytes();
    if (lanes == 0 || (a.n_blocks == 0 && a.n_segments == 0)) return;
    int64_t k[4], v[4];
    byte_strides(a.k, 4, k);
    byte_strides(a.v, 4, v);
    char *k_data = static_cast<char*>(a.k.data), *v_data = static_cast<char*>(a.v.data);
    auto offset = [&](const int64_t* stride, int64_t lane) {  // numbered (layer, head, sequence): weights are shared
        const int64_t b = lane % batch, head = lane / batch % x.heads, layer = lane / batch / x.heads;
        return layer * stride[0] + b * stride[1] + head * stride[2];
    };
    auto run = [&](Collapser& task, int64_t first, int64_t end) {
        for (int64_t lane = first; lane < end; ++lane) {
            char *keys = k_data + offset(k, lane), *values = v_data + offset(v, lane);
            if (a.n_blocks) task.worker.select(lane / batch / x.heads, lane / batch % x.heads);
            for (int64_t q = 0; q < a.n_blocks; q += kGroup) {
                const int64_t n = std::min(kGroup, a.n_blocks - q);
                task.worker.pool(n, [&](int64_t i) -> BlockRows {
                    if (q + i < a.n_blocks) return {keys, values, a.children + (q + i) * x.count};
                    if (lane + 1 == end) return {};
                    return {k_data + offset(k, lane + 1), v_data + offset(v, lane + 1), a.children};
                });
                for (int64_t i = 0; i < n * x.gists; ++i) {
                    char* to = task.gists.data() + (q * x.gists + i) * 2 * row;
                    task.worker.write(i, to, to + row);
                }
            }
            move(keys, k[3], row, a.segments, a.n_segments);
            move(values, v[3], row, a.segments, a.n_segments);
            for (int64_t i = 0; i < a.n_blocks * x.gists; ++i) {
                const char* from = task.gists.data() + i * 2 * row;
                std::memcpy(keys + a.gist_slots[i] * k[3], from, static_cast<size_t>(row));
                std::memcpy(values + a.gist_slots[i] * v[3], from + row, static_cast<size_t>(row));
            }
        }
    };
    auto make = [&] {
        return Collapser{Worker(x, ops, k[3], v[3]),
                         std::vector<char>(static_cast<size_t>(a.n_blocks * x.gists * 2 * row))};
    };
    int64_t moved = 0;
    for (int64_t i = 0; i < a.n_segments; ++i) moved += a.segments[3 * i + 2];
    each_run(lanes, read_bytes(x, lanes * a.n_blocks) + lanes * moved * 4 * row, n_threads, make, run);
}

}  // namespace
}  // namespace mc

extern "C" int32_t mc_gist_pool_cpu(const mc_gist_pool_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        mc::gist_pool(*args, n_threads);
    });
}

extern "C" int32_t mc_collapse_cpu(const mc_collapse_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        mc::collapse(*args, n_threads);
    });
}
