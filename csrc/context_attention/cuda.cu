// mc_context_attention_cuda: checks, tiles and splits, launches. The kernels: kernel.cuh.
#include <algorithm>
#include <type_traits>

#include "check.h"
#include "host_checks.h"
#include "kernel.cuh"
#include "launch.cuh"

namespace mc::cuda {
namespace {

constexpr int64_t kMostDims = 256, kLeastSplit = 64;
// Resident at a time on a multiprocessor, by registers: of a tile of 16 rows, of others.
constexpr int64_t kBlocksOfMany = 2, kBlocksOfFew = 3;

struct Layout {
    bool tensor;
    int64_t tile_rows, row_tiles, splits, chunk;
    int64_t tops, totals, row_top, row_total, logits, bytes;  // offsets into the workspace, in bytes
};

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Layout layout_of(const mc_context_attention_args& a, const Attention& x) {
    Layout l{};
    const int64_t dims = x.row.dims;
    const bool whole = !a.inv_freq || 2 * x.row.half == dims;
    l.tensor = x.dtype != MC_F32 && (dims == 64 || dims == 128) && whole && rows_on_16(a.q) && rows_on_16(a.k) &&
               rows_on_16(a.v);
    // Of fp8 by 8, however many: a tile of 16 is worth no instances of its own.
    l.tile_rows = !l.tensor ? kPlainRows : x.rows <= 8 || x.fp8 ? 8 : 16;
    l.row_tiles = (x.rows + l.tile_rows - 1) / l.tile_rows;
    const int64_t rows = x.batch * x.heads * x.queries, programs = x.batch * x.kv_heads * l.row_tiles;
    if (rows == 0 || x.slots == 0) return l;
    const int64_t tile = l.tensor ? kTileSlots : kPlainSlots;  // a warp's, a block's
    const int64_t resident = l.tile_rows == 16 ? kBlocksOfMany : kBlocksOfFew;
    l.splits = std::clamp<int64_t>(resident * multiprocessors() / programs, 1,
                                   std::min<int64_t>(kMostSplits, std::max<int64_t>(x.slots / kLeastSplit, 1)));
    l.chunk = ((x.slots + l.splits - 1) / l.splits + tile - 1) / tile * tile;
    l.splits = (x.slots + l.chunk - 1) / l.chunk;
    if (l.splits > 1) {
        l.tops = padded(l.splits * rows * dims * 4);
        l.totals = l.tops + padded(l.splits * rows * 4);
        l.bytes = l.totals + padded(l.splits * rows * 4);
    }
    if (a.mass) {
        l.row_top = l.bytes;
        l.row_total = l.row_top + padded(rows * 4);
        l.logits = l.row_total + padded(rows * 4);
        l.bytes = l.logits + padded(rows * x.slots * 4);
    }
    return l;
}

Attention check(const mc_context_attention_args& a) {
    const Attention x = check_context_attention(a, true);
    if (x.row.dims > kMostDims) {
        invalid("q: expected at most D = " + std::to_string(kMostDims) + ", got shape " + shape_text(a.q));
    }
    narrow("q", x.heads * x.queries);
    narrow("k", x.slots + 2 * kLeastSplit);
    return x;
}

void set_call(AttendCall& c, const mc_context_attention_args& a, const Attention& x, const Layout& l, void* workspace) {
    char* const memory = static_cast<char*>(workspace);
    c.q = static_cast<const char*>(a.q.data);
    c.k = static_cast<const char*>(a.k.data);
    c.v = static_cast<const char*>(a.v.data);
    c.out = static_cast<char*>(a.out.data);
    std::copy_n(x.q_stride, 3, c.q_step);
    std::copy_n(x.k_stride, 3, c.k_step);
    std::copy_n(x.v_stride, 3, c.v_step);
    std::copy_n(x.out_stride, 3, c.out_step);
    c.q_pos = a.q_pos;
    c.kv_pos = a.kv_pos;
    c.inv_freq = x.row.half ? a.inv_freq : nullptr;
    c.sigma = x.row.half ? a.sigma : nullptr;
    c.bias = a.kv_bias;
    c.k_scale = a.k_scale;
    c.v_scale = a.v_scale;
    c.lse = a.lse;
    c.mass = a.mass;
    const auto at = [&](int64_t offset) { return reinterpret_cast<float*>(memory + offset); };
    if (a.mass && l.splits) {
        c.row_top = at(l.row_top);
        c.row_total = at(l.row_total);
        c.logits = at(l.logits);
    }
    c.tops = l.splits > 1 ? at(l.tops) : c.row_top;
    c.totals = l.splits > 1 ? at(l.totals) : c.row_total;
    c.partial_out = l.splits > 1 ? at(0) : nullptr;
    const double magnitude = a.inv_freq ? a.attention_scaling * a.attention_scaling : 1.0;
    c.scale = static_cast<float>(a.scale * magnitude);
    c.all_rows = x.batch * x.heads * x.queries;
    c.batch = narrow("q", x.batch);
    c.heads = narrow("q", x.heads);
    c.kv_heads = narrow("k", x.kv_heads);
    c.group = narrow("q", x.heads / x.kv_heads);
    c.queries = narrow("q", x.queries);
    c.slots = narrow("k", x.slots);
    c.dims = narrow("q", x.row.dims);
    c.half = narrow("half", x.row.half);
    c.rows = narrow("q", x.rows);
    c.row_tiles = narrow("q", l.row_tiles);
    c.splits = narrow("k", l.splits);
    c.chunk = narrow("k", l.chunk);
    c.interleaved = x.interleaved;
}

void watch(Watched& watched, const mc_context_attention_args& a, const Attention& x, void* workspace, int64_t bytes) {
    watched.view("q", a.q, false);
    watched.view("k", a.k, false);
    watched.view("v", a.v, false);
    watched.view("out", a.out, true);
    watched.array("q_pos", a.q_pos, 8 * x.batch * x.queries, false);
    watched.array("kv_pos", a.kv_pos, 8 * x.batch * x.slots, false);
    watched.array("inv_freq", a.inv_freq, 8 * x.row.half, false);
    watched.array("sigma", a.sigma, 4 * x.batch * x.slots, false);
    watched.array("kv_bias", a.kv_bias, 4 * x.batch * x.slots, false);
    watched.array("k_scale", a.k_scale, 4 * x.kv_heads, false);
    watched.array("v_scale", a.v_scale, 4 * x.kv_heads, false);
    watched.array("lse", a.lse, 4 * x.batch * x.heads * x.queries, true);
    watched.array("mass", a.mass, 4 * x.batch * x.slots, true);
    watched.array("workspace", workspace, bytes, true);
}

template <class E, class S, int D, int T>
void launch_tensor(const AttendCall& c, int64_t blocks, void* stream) {
    const int threads = block_threads(kTensorThreads);
    launch("context_attention", attend_tensor<E, S, D, T>, blocks, threads, tensor_shared_bytes<D, T>(threads, c.half),
           stream, c);
}

template <class E, class S>
void attend(const AttendCall& c, const Layout& l, int64_t blocks, void* stream) {
    if constexpr (sizeof(typename E::Bits) == 2) {
        if (l.tensor) {
            constexpr int kMost = std::is_same_v<S, Fp8> ? 1 : 2;
            const bool few = l.tile_rows == 8;
            const auto go = c.dims == 64 ? few ? launch_tensor<E, S, 64, 1> : launch_tensor<E, S, 64, kMost>
                            : few        ? launch_tensor<E, S, 128, 1>
                                         : launch_tensor<E, S, 128, kMost>;
            return go(c, blocks, stream);
        }
    }
    const int threads = std::max(block_threads(kPlainThreads), (c.dims + 63) / 64 * 32);
    launch("context_attention (plain)", attend_plain<E, S>, blocks, threads,
           PlainMemory::bytes(c.dims, c.half, threads / 32), stream, c);
}

template <class E>
void launch_all(const AttendCall& c, const Layout& l, bool fp8, void* stream) {
    if (c.all_rows && l.splits) {
        const int64_t blocks = static_cast<int64_t>(c.batch) * c.kv_heads * l.row_tiles * l.splits;
        fp8 ? attend<E, Fp8>(c, l, blocks, stream) : attend<E, E>(c, l, blocks, stream);
    }
    if (c.all_rows && l.splits != 1) {
        const int threads = block_threads(kJoinThreads);
        launch("context_attention (splits)", join_splits<E>, c.all_rows, threads,
               join_shared_bytes(threads, c.splits, c.dims), stream, c);
    }
    const int64_t slots = static_cast<int64_t>(c.batch) * c.slots;
    if (c.mass && slots) {
        const int threads = block_threads(kMassThreads);
        launch("context_attention (mass)", sum_mass, (slots + threads - 1) / threads, threads, 0, stream, c);
    }
}

void context_attention(const mc_context_attention_args& a, void* workspace, int64_t workspace_bytes, void* stream) {
    const Attention x = check(a);
    const Layout l = layout_of(a, x);
    check_workspace(workspace, workspace_bytes, l.bytes);
    const int64_t rows = x.batch * x.heads * x.queries;
    const int64_t blocks = std::max(x.batch * x.kv_heads * l.row_tiles * std::max<int64_t>(l.splits, 1),
                                    std::max(rows, x.batch * x.slots));
    if (blocks > kMostBlocks) {
        invalid("q: expected a call of at most " + std::to_string(kMostBlocks) + " blocks, got " +
                std::to_string(blocks));
    }
    AttendCall c{};
    set_call(c, a, x, l, workspace);
    Watched watched;
    watch(watched, a, x, workspace, l.bytes);
    switch (x.dtype) {
        case MC_F32:
            return launch_all<Float>(c, l, x.fp8, stream);
        case MC_F16:
            return launch_all<Half>(c, l, x.fp8, stream);
        default:
            return launch_all<Bfloat>(c, l, x.fp8, stream);
    }
}

}  // namespace
}  // namespace mc::cuda

extern "C" int32_t mc_context_attention_cuda_workspace(const mc_context_attention_args* args, int64_t* bytes) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (!bytes) mc::invalid("bytes: expected an address, got NULL");
        const mc::Attention x = mc::cuda::check(*args);
        *bytes = mc::cuda::layout_of(*args, x).bytes;
    });
}

extern "C" int32_t mc_context_attention_cuda(const mc_context_attention_args* args, void* workspace,
                                             int64_t workspace_bytes, void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::context_attention(*args, workspace, workspace_bytes, stream);
    });
}
