// mc_lens_score_cuda: checks, sizes, the workspace, the launch. The kernels: fast_kernel.cuh where it can, else
// kernel.cuh.
#include <algorithm>

#include "check.h"
#include "fast_kernel.cuh"
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
    c.chunk = kChunk;
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
    take(c.squares, 4 * c.parts_n * kFastQueries);
    take(c.inverse, 4 * tiles * kTile);
    take(c.tile_tops, 4 * tiles * kTile);
    return used;
}

// As many as an H100 has multiprocessors; a constant, so that the workspace is one of shapes.
constexpr int kTasks = 132;

// Splits of N such that a weighted sum of `columns` has a task for each block.
int32_t splits_of(const LensCall& c, int columns) {
    return std::max(std::min(kTasks / ((c.e + columns - 1) / columns), c.tiles), 1);
}

// Sizes that fast_kernel.cuh serves.
bool has_fast_sizes(const LensCall& c) {
    const int size = c.head_dim();
    return c.operand != MC_F32 && c.q <= kFastQueries && c.vectors_n() <= kTile && c.n_direct <= kFastVectors - kTile &&
           c.e % 32 == 0 && c.d % 32 == 0 && c.f % 32 == 0 && std::max(c.d, c.f) <= kFastChunk &&
           (size == 16 || size == 32 || size == 64 || size == 128) && c.inputs % 8 == 0 && c.inputs <= kFastInputs &&
           c.hidden > 0 && c.heads * c.head_values <= kFastInputs;
}

// It reads rows 16 bytes at a time.
bool has_fast_rows(const LensCall& c, const mc_lens_score_args& a) {
    bool fit = c.aligned && rows_on_16(a.queries);
    for (const LensWeight& w : kLensWeightViews) fit = fit && rows_on_16(a.*w.view);
    return fit;
}

// Of entries that L2 is to keep: an H100 has 50 MB, for the weights and what blocks exchange too.
constexpr int64_t kKeptBytes = 34 << 20;

// Sums of few splits, which the next step adds up again in every block; four chunks of E, for 128 blocks at d = 512.
LensCall fast_call(LensCall c) {
    c.splits = std::min(splits_of(c, kFastWidth), 8);
    c.chunk = std::min((c.e + 127) / 128 * 32, kFastChunk);
    c.parts_n = (c.e + c.chunk - 1) / c.chunk;
    const int64_t bytes = int64_t{2} * c.n * c.e;
    c.keep = bytes <= kKeptBytes ? 0 : static_cast<int32_t>(8 * kKeptBytes / bytes);
    return c;
}

LensCall call_of(const mc_lens_score_args& a, Lens& x) {
    x = check_lens_score(a);
    LensCall c{};
    set_sizes(c, a, x);
    set_weights(c, a);
    c.splits = splits_of(c, kTile);
    return c;
}

// Bytes of workspace, enough for both kernels: which of them serves depends on addresses too.
int64_t workspace_of(const LensCall& c) {
    const int64_t bytes = c.operand == MC_F32 ? 4 : 2;
    LensCall slow = c, fast = fast_call(c);
    const int64_t needed = place(slow, nullptr, bytes);
    return has_fast_sizes(c) ? std::max(needed, place(fast, nullptr, bytes)) : needed;
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
    const bool fast = has_fast_sizes(c) && has_fast_rows(c, a);
    const int64_t shared = fast ? kFastShared : shared_for(c, operand), needed = workspace_of(c);
    if (x.entries == 0) return;
    check_workspace(workspace, workspace_bytes, needed);
    if (fast) c = fast_call(c);
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
        const char* const name = fast ? "lens_score_fast" : "lens_score";
        launch(name, kernel, multiprocessors(), kLensThreads, shared, stream, c, true);
    };
    if (fast) return operand == MC_F16 ? start(lens_score_fast<Half>) : start(lens_score_fast<Bfloat>);
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
        const mc::cuda::LensCall c = mc::cuda::call_of(*args, x);
        *bytes = x.entries ? mc::cuda::workspace_of(c) : 0;
    });
}

extern "C" int32_t mc_lens_score_cuda(const mc_lens_score_args* args, void* workspace, int64_t workspace_bytes,
                                      void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::score(*args, workspace, workspace_bytes, stream);
    });
}
