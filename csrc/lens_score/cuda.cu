// mc_lens_score_cuda: checks, sizes, the workspace, the launch. The kernel: kernel.cuh.
#include <algorithm>

#include "check.h"
#include "kernel.cuh"
#include "launch.cuh"
#include "put_words.cuh"

namespace mc::cuda {
namespace {

constexpr int64_t kMostShared = 160 << 10;  // what every architecture gives a block

LensRows rows_of(const mc_tensor& x) {
    const int64_t bytes = dtype_bytes(x.dtype);
    const int last = x.ndim - 1;
    return {static_cast<const char*>(x.data),
            x.ndim == 3   ? x.stride[0] * bytes
            : x.ndim == 2 ? x.stride[0] * bytes
                          : 0,
            x.ndim == 1 ? 0 : x.stride[last - 1] * bytes};
}

// What is multiplied with entries: their type where the weights have it too, fp32 where something is or types differ.
int operand_of(const Lens& x) { return x.dtype == x.weight_dtype ? x.dtype : static_cast<int>(MC_F32); }

void set_weights(LensCall& c, const mc_lens_score_args& a) {
    using Field = LensRows LensCall::*;
    static constexpr Field kFields[kLensWeights] = {
        &LensCall::w_in,     &LensCall::read_norm,     &LensCall::read_q,   &LensCall::read_k,
        &LensCall::read_v,   &LensCall::read_out,      &LensCall::mlp_norm, &LensCall::mlp_gate_up,
        &LensCall::mlp_down, &LensCall::score_norm,    &LensCall::score_q,  &LensCall::score_k,
        &LensCall::score_v,  &LensCall::direct,        &LensCall::head_in,  &LensCall::head_bias,
        &LensCall::head_out, &LensCall::head_out_bias,
    };
    for (int i = 0; i < kLensWeights; ++i) c.*kFields[i] = rows_of(a.*kLensWeightViews[i].view);
}

void set_sizes(LensCall& c, const mc_lens_score_args& a, const Lens& x) {
    c.entries = rows_of(a.entries);
    c.features = rows_of(a.features);
    c.queries = rows_of(a.queries);
    c.legal = a.legal;
    c.out = static_cast<char*>(a.out.data);
    c.out_row = a.out.stride[0] * 4;
    c.out_column = a.out.stride[1] * 4;
    c.entry_dtype = x.dtype;
    c.weight_dtype = x.weight_dtype;
    c.operand = operand_of(x);
    c.n = narrow("entries", x.entries);
    narrow("entries", x.entries + kTile);
    c.e = narrow("entries", x.dims);
    c.q = static_cast<int32_t>(x.queries);
    c.d = narrow("w_in", x.width);
    c.heads = narrow("n_heads", x.heads);
    c.passes = narrow("read_q", x.passes);
    c.f = narrow("mlp_down", x.ffn);
    c.head_values = narrow("score_v", x.head_values);
    c.n_direct = static_cast<int32_t>(x.direct);
    c.n_features = narrow("features", x.features);
    c.hidden = narrow("head_in", x.hidden);
    c.inputs = narrow("head_in", x.inputs);
    if (x.vectors() + x.direct > kTileRows) {
        invalid("n_heads: expected H Q + J of at most " + std::to_string(kTileRows) + " on a device, got " +
                std::to_string(x.vectors() + x.direct));
    }
    const int bytes = static_cast<int>(dtype_bytes(operand_of(x)));
    c.e_step = narrow("entries", (x.dims + 15) / 16 * 16);
    c.parts_n = (c.e + kChunk - 1) / kChunk;
    c.aligned = operand_of(x) == x.dtype && c.e * bytes % 16 == 0 && rows_on_16(a.entries);
    c.tiles = (c.n + kTile - 1) / kTile;
}

// Buffers one after the other, each on 256 bytes. Returns their bytes; with an address they are placed.
int64_t place(LensCall& c, char* base, int64_t bytes) {
    int64_t used = 0;
    const auto take = [&](auto*& to, int64_t n) {
        if (base) to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + used);
        used += (n + 255) / 256 * 256;
    };
    const int64_t count = c.vectors_n(), tiles = c.tiles, rows = kMost;
    take(c.vectors, kTileRows * static_cast<int64_t>(c.e_step) * bytes);
    take(c.p, count * tiles * kTile * bytes);
    take(c.z, 4 * rows * padded_to_4(c.d));
    take(c.tops, 4 * count * tiles);
    take(c.totals, 4 * count * tiles);
    take(c.sums, 4 * c.splits * count * c.e_step);
    take(c.parts, 4 * c.parts_n * rows * padded_to_4(c.d));
    take(c.act, 4 * rows * padded_to_4(c.f));
    take(c.values, 4 * rows * c.heads * c.head_values);
    return used;
}

// Splits of N such that a weighted sum has a task for each block; of shapes alone, so that the workspace is too.
int32_t splits_of(const LensCall& c) {
    constexpr int kTasks = 132;
    return std::max(std::min(kTasks / ((c.e + kTile - 1) / kTile), c.tiles), 1);
}

LensCall call_of(const mc_lens_score_args& a, Lens& x) {
    x = check_lens_score(a);
    LensCall c{};
    set_sizes(c, a, x);
    set_weights(c, a);
    c.splits = splits_of(c);
    return c;
}

int64_t shared_for(const LensCall& c, int operand) {
    const int64_t widest = std::max(c.d, c.f);
    const int64_t bytes = operand == MC_F32 ? lens_shared_bytes<Float>(c.q, widest, c.head_dim(), c.inputs)
                                            : lens_shared_bytes<Half>(c.q, widest, c.head_dim(), c.inputs);
    if (bytes > kMostShared) {
        invalid("head_in: expected d, f and X for which a block needs at most " + std::to_string(kMostShared) +
                " bytes of shared memory, got " + std::to_string(bytes) + " with d = " + std::to_string(c.d) +
                ", f = " + std::to_string(c.f) + ", X = " + std::to_string(c.inputs));
    }
    return bytes;
}

void score(const mc_lens_score_args& a, void* workspace, int64_t workspace_bytes, void* stream) {
    Lens x{};
    LensCall c = call_of(a, x);
    const int operand = operand_of(x);
    const int64_t shared = shared_for(c, operand), needed = place(c, nullptr, dtype_bytes(operand));
    if (x.entries == 0) return;
    check_workspace(workspace, workspace_bytes, needed);
    place(c, static_cast<char*>(workspace), dtype_bytes(operand));
    Watched watched;
    watched.view("entries", a.entries, false);
    watched.view("features", a.features, false);
    watched.view("queries", a.queries, false);
    for (const LensWeight& w : kLensWeightViews) watched.view(w.name, a.*w.view, false);
    watched.array("legal", a.legal, 2 * x.entries, false);
    watched.view("out", a.out, true);
    watched.array("workspace", workspace, needed, true);
    const auto start = [&](auto kernel) {
        launch("lens_score", kernel, multiprocessors(), kLensThreads, shared, stream, c, true);
    };
    if (operand == MC_F32) return start(lens_score<Float>);
    operand == MC_F16 ? start(lens_score<Half>) : start(lens_score<Bfloat>);
}

}  // namespace
}  // namespace mc::cuda

extern "C" int32_t mc_lens_score_cuda_workspace(const mc_lens_score_args* args, int64_t* bytes) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (!bytes) mc::invalid("bytes: expected an address, got NULL");
        mc::Lens x{};
        mc::cuda::LensCall c = mc::cuda::call_of(*args, x);
        *bytes = x.entries ? mc::cuda::place(c, nullptr, mc::dtype_bytes(mc::cuda::operand_of(x))) : 0;
    });
}

extern "C" int32_t mc_lens_score_cuda(const mc_lens_score_args* args, void* workspace, int64_t workspace_bytes,
                                      void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::score(*args, workspace, workspace_bytes, stream);
    });
}
