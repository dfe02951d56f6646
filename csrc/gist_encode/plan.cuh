// The host's choice of how windows go through the encoder, and where in the workspace things are. See kernel.cuh.
#pragma once

#include <algorithm>

#include "host_checks.h"
#include "net.h"
#include "resident.cuh"
#include "window.cuh"

namespace mc::cuda {

// Rows that go through in one launch of streaming; in bulk together, which bounds the workspace: where they stay with
// their blocks a row costs next to nothing.
constexpr int64_t kStreamed = 264, kChunkRows = 32768, kResidentRows = 131072;
// Blocks with windows of their own, at most: what their scratch is counted for.
constexpr int64_t kMostResidentBlocks = 160;

// Wider nets are for tiles (resident.cuh).
constexpr int64_t kMostResidentWidth = 768;

// kUnits: a launch a stage, as streaming has them: what is not for tiles.
enum class Way { kStreamed, kUnits, kTiled, kResident };

struct Plan {
    Way way;
    bool tensor;
    int64_t windows;                       // of a chunk
    int64_t rows, group, columns, passed;  // kResident: rows and windows of a block; its scratch's row, heads at a time
    int64_t h, turned, attention, swiglu, pooled, y, centred, phases, scratch, flags, bytes;
};

inline bool dense_on_16(const mc_gist_encode_weights& w) {
    for (const mc_tensor* x : {&w.w_in, &w.attn_norm, &w.qkv, &w.attn_out, &w.ffn_norm, &w.gate_up, &w.down, &w.w_out,
                               &w.level_emb, &w.pool_q}) {
        if (!rows_on_16(*x)) return false;
    }
    return true;
}

inline bool on_tensor_cores(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net) {
    return a.blocks.dtype == w.w_in.dtype && a.blocks.dtype != MC_F32 && net.embed % 8 == 0 && net.width % 8 == 0 &&
           net.ffn % 8 == 0 && rows_on_16(a.blocks) && dense_on_16(w);
}

inline int64_t rows_each(const mc_gist_encode_args& a, const Net& net) {
    return a.blocks.size[1] + (net.pool == Pool::kCls);
}

// A group of so many rows is worth it where windows fill three quarters of them.
inline bool may_stay(const mc_gist_encode_args& a, const Net& net, int64_t rows) {
    const int64_t each = rows_each(a, net);
    return net.head_dim() <= kResidentHead && net.width <= kMostResidentWidth && rows / each * each * 4 >= rows * 3;
}

inline Plan lay_out(const mc_gist_encode_args& a, const Net& net, Way way, bool tensor, int64_t group_rows = 0) {
    Plan p{};
    p.way = way;
    p.tensor = tensor;
    const int64_t each = rows_each(a, net), all = a.blocks.size[0], bytes = tensor ? 2 : 4;
    const bool resident = way == Way::kResident;
    p.windows = std::min(all, std::max<int64_t>((resident ? kResidentRows : kChunkRows) / each, 1));
    if (all == 0) return p;
    const int64_t rows = p.windows * each, gists = p.windows * net.gists;
    const auto take = [&](int64_t& at, int64_t n, int64_t size) {
        at = p.bytes;
        p.bytes += (n * size + 255) / 256 * 256;
    };
    if (resident) {
        p.rows = group_rows;
        p.group = group_rows / each;
        // As many heads at a time as keep the row within SwiGLU's, the same number in each pass.
        const int64_t head = 3 * net.head_dim(), fit = std::max<int64_t>((net.ffn - net.width) / head, 1);
        const int64_t passes = (net.heads + fit - 1) / fit;
        p.passed = (net.heads + passes - 1) / passes;
        p.columns = std::max(net.ffn, p.passed * head + net.width);
        const int64_t blocks = std::min(kMostResidentBlocks, (p.windows + p.group - 1) / p.group);
        take(p.scratch, blocks * p.rows * p.columns, bytes);
    } else {
        take(p.h, rows * net.width, bytes);
        take(p.turned, rows * 3 * net.width, bytes);
        take(p.attention, rows * net.width, bytes);
        take(p.swiglu, rows * net.ffn, bytes);
    }
    take(p.pooled, gists * net.width, bytes);
    take(p.y, gists * net.embed, 4);
    take(p.centred, p.windows * net.embed, 4);
    take(p.phases, each * net.head_dim(), 4);
    if (way == Way::kStreamed) take(p.flags, kMostFlags, 4);
    return p;
}

// What is known without the device; kTiled: or kResident. Tiles read heads in pieces of 16 bytes, and a layer's weights
// from offsets of 32 bits.
inline Way way_of(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net, bool tensor) {
    if (a.blocks.size[0] * rows_each(a, net) <= kStreamed) return Way::kStreamed;
    bool tiles = tensor && net.head_dim() % 8 == 0;
    for (const mc_tensor* x : {&w.w_in, &w.qkv, &w.attn_out, &w.gate_up, &w.down, &w.w_out}) {
        const int64_t rows = x->size[x->ndim - 2];
        tiles = tiles && (rows < 2 || x->stride[x->ndim - 2] < (int64_t{1} << 31) / rows);
    }
    return tiles ? Way::kTiled : Way::kUnits;
}

// For the device at hand. Windows stay with their blocks if they fit there and give every multiprocessor a group: one alone
// reads 8 MB a layer, which takes it 70 us, while tiles spread the weights over all.
inline Plan plan_of(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net,
                    int64_t multiprocessors, int64_t shared_bytes) {
    const bool tensor = on_tensor_cores(w, a, net);
    const Way way = way_of(w, a, net, tensor);
    if (way != Way::kTiled) return lay_out(a, net, way, tensor);
    for (const int64_t rows : {128, 64}) {
        if (!may_stay(a, net, rows)) continue;
        const int64_t group = rows / rows_each(a, net);
        const int64_t bytes = rows == 128 ? resident_bytes<4>(net.width) : resident_bytes<2>(net.width);
        if (bytes > shared_bytes || (a.blocks.size[0] + group - 1) / group < multiprocessors) continue;
        return lay_out(a, net, Way::kResident, true, rows);
    }
    return lay_out(a, net, way, true);
}

// Enough for any device: which one it will be is not known yet.
inline int64_t workspace_bytes(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net) {
    const bool tensor = on_tensor_cores(w, a, net);
    const Way way = way_of(w, a, net, tensor);
    int64_t most = lay_out(a, net, way, tensor).bytes;
    if (way != Way::kTiled) return most;
    for (const int64_t rows : {128, 64}) {
        if (may_stay(a, net, rows)) most = std::max(most, lay_out(a, net, Way::kResident, true, rows).bytes);
    }
    return most;
}

}  // namespace mc::cuda
