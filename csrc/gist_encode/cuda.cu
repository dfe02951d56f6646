// mc_gist_encode_cuda: checks, chunks of windows, launches. The kernels: kernel.cuh, tiled.cuh, resident.cuh.
#include <algorithm>
#include <cmath>

#include "kernel.cuh"
#include "launch.cuh"
#include "plan.cuh"
#include "stream_kernel.cuh"
#include "window_kernel.cuh"

namespace mc::cuda {
namespace {

Net check(const mc_gist_encode_weights& w, const mc_gist_encode_args& a) {
    const Net net = check_weights(w);
    check_windows(a, net);
    if (net.head_dim() > kMostHeadDims) {
        invalid("n_heads: expected heads of at most " + std::to_string(kMostHeadDims) + ", got " +
                std::to_string(net.head_dim()));
    }
    narrow("blocks", a.blocks.size[1] + 1);
    narrow("gate_up", 2 * net.ffn);
    narrow("qkv", 3 * net.width);
    narrow("blocks", (kResidentRows + a.blocks.size[1]) * std::max({net.head_dim(), net.gists, 2 * net.heads}));
    // Logits and norms of a window's rows, when it is pooled.
    const int64_t most = (40 << 10) / 8;
    if (a.blocks.size[1] + 1 > most) {
        invalid("blocks: expected K < " + std::to_string(most) + ", got " + std::to_string(a.blocks.size[1]));
    }
    return net;
}

Matrix matrix(const mc_tensor& x) {
    const int64_t bytes = dtype_bytes(x.dtype);
    Matrix m{static_cast<const char*>(x.data), 0, 0};
    if (x.ndim == 3) m.layer = x.stride[0] * bytes;
    if (x.ndim >= 2) m.row = x.stride[x.ndim - 2] * bytes;
    return m;
}

// A row a layer.
Matrix by_layer(const mc_tensor& x) {
    const Matrix m = matrix(x);
    return {m.data, m.row, 0};
}

EncodeCall call_of(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net, const Plan& p,
                   void* workspace) {
    EncodeCall c{};
    const int64_t bytes = dtype_bytes(a.blocks.dtype);
    c.blocks_n = a.blocks.stride[0] * bytes;
    c.blocks_k = a.blocks.stride[1] * bytes;
    c.out_n = a.out.stride[0] * bytes;
    c.out_g = a.out.stride[1] * bytes;
    c.mu = matrix(w.mu);
    c.w_in = matrix(w.w_in);
    c.level = matrix(w.level_emb);
    c.level.data += (std::min(a.level, net.levels) - 1) * c.level.row;
    c.attn_norm = by_layer(w.attn_norm);
    c.qkv = matrix(w.qkv);
    c.attn_out = matrix(w.attn_out);
    c.ffn_norm = by_layer(w.ffn_norm);
    c.gate_up = matrix(w.gate_up);
    c.down = matrix(w.down);
    c.final_norm = matrix(w.final_norm);
    c.pool_q = matrix(w.pool_q);
    c.w_out = matrix(w.w_out);
    c.gain = matrix(w.gain);
    char* const memory = static_cast<char*>(workspace);
    if (p.way == Way::kResident) {
        c.scratch = memory + p.scratch;
        c.group = narrow("blocks", p.group);
        c.scratch_columns = narrow("down", p.columns);
        c.pass_heads = narrow("n_heads", p.passed);
    } else {
        c.h = memory + p.h;
        c.turned = memory + p.turned;
        c.attention = memory + p.attention;
        c.swiglu = memory + p.swiglu;
    }
    c.pooled = memory + p.pooled;
    c.y = reinterpret_cast<float*>(memory + p.y);
    c.centred = reinterpret_cast<float*>(memory + p.centred);
    c.phases = reinterpret_cast<float*>(memory + p.phases);
    c.flags = reinterpret_cast<uint32_t*>(memory + p.flags);
    c.log2_theta = std::log2(net.rope_theta);
    c.target_rms = static_cast<float>(net.target_rms);
    c.tokens = static_cast<int32_t>(a.blocks.size[1]);
    c.rows_each = c.tokens + (net.pool == Pool::kCls);
    c.embed = narrow("w_in", net.embed);
    c.width = narrow("w_in", net.width);
    c.layers = narrow("qkv", net.layers);
    c.heads = narrow("n_heads", net.heads);
    c.half = narrow("n_heads", net.head_dim() / 2);
    c.ffn = narrow("down", net.ffn);
    c.gists = narrow("pool_q", net.gists);
    c.pool = static_cast<int32_t>(net.pool);
    c.blocks_dtype = a.blocks.dtype;
    c.weights_dtype = w.w_in.dtype;
    c.centres = a.level == 1;
    return c;
}

void watch(Watched& watched, const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Plan& p,
           void* workspace) {
    watched.view("blocks", a.blocks, false);
    watched.view("out", a.out, true);
    watched.view("mu", w.mu, false);
    watched.view("w_in", w.w_in, false);
    watched.view("level_emb", w.level_emb, false);
    watched.view("attn_norm", w.attn_norm, false);
    watched.view("qkv", w.qkv, false);
    watched.view("attn_out", w.attn_out, false);
    watched.view("ffn_norm", w.ffn_norm, false);
    watched.view("gate_up", w.gate_up, false);
    watched.view("down", w.down, false);
    watched.view("final_norm", w.final_norm, false);
    watched.view("pool_q", w.pool_q, false);
    watched.view("w_out", w.w_out, false);
    watched.view("gain", w.gain, false);
    watched.array("workspace", workspace, p.bytes, true);
}

// Blocks that a stage can use, at most.
int64_t most_units(const EncodeCall& c, int stage) {
    const Step step = c.step(stage);
    return units_of(c, step, Linear(c, step, 0));
}

// Stages [first, last) by units, a launch each, or all in one.
template <class M>
void run_units(EncodeCall& c, int first, int last, bool together, void* stream) {
    const int threads = block_threads(kEncodeThreads);
    const int64_t shared = std::max({ProductMemory::bytes(threads / 32), AttendMemory::bytes(2 * c.half, threads / 32),
                                     2 * shared_bytes_of<float>(c.rows_each)});
    c.together = together;
    for (int s = first; s < last; s = c.last_stage) {
        c.first_stage = s;
        c.last_stage = together ? last : s + 1;
        int64_t most = 1;
        for (int i = s; i < c.last_stage; ++i) most = std::max(most, most_units(c, i));
        if (together) most = std::min<int64_t>(most, multiprocessors());
        launch(together ? "gist_encode (streaming)" : "gist_encode (bulk)", encode<M>, most, threads, shared, stream, c,
               together);
    }
}

// All in one, heads in pieces of 16 bytes. In the emulation what threads hold bounds how few they are.
template <class E>
void run_stream(EncodeCall& c, void* stream) {
    const int threads = std::max(block_threads(kEncodeThreads), 32);
    int64_t most = 1;
    for (int i = 0; i < c.stages(); ++i) most = std::max(most, most_units(c, i));
    launch("gist_encode (streaming)", encode_stream<E>, std::min<int64_t>(most, multiprocessors()), threads,
           stream_bytes(c, threads / 32), stream, c, true);
}

// One window and a net that the multiprocessors hold together (window.cuh)?
bool fits_window(EncodeCall& c) {
    const int blocks = multiprocessors(), threads = std::max(block_threads(kWindowThreads), 32);
    const bool whole = c.embed % kChunk == 0 && c.width % kChunk == 0 && c.ffn % kChunk == 0 && c.half % 8 == 0;
    if (!whole || c.rows > kWindowRows || 2 * c.half > kWindowHead || c.stages() > kMostStages) return false;
    if (blocks > kMostFlags || !copies_rows()) return false;
    const int64_t bytes = most_weights(c, blocks), limit = shared_limit();
    c.window_bytes = static_cast<int32_t>(std::min(bytes, limit));
    return WindowMemory::bytes(c, threads / 32) <= limit;
}

template <class E>
void run_window(EncodeCall& c, void* stream) {
    const int threads = std::max(block_threads(kWindowThreads), 32);
    launch("gist_encode (window)", encode_window<E>, multiprocessors(), threads, WindowMemory::bytes(c, threads / 32),
           stream, c, true);
}

// One linear map by tiles: the widest that give every multiprocessor one.
template <class E>
void run_tiles(EncodeCall& c, int stage, void* stream) {
    c.first_stage = stage;
    c.last_stage = stage + 1;
    const Step step = c.step(stage);
    const Linear l(c, step, 0);
    const int64_t rows = (l.rows + kTileRows<kTiledRows> - 1) / kTileRows<kTiledRows>, most = multiprocessors();
    int64_t tiles = 0;
    for (int width = kTileOutputs; width >= 64 && tiles < most; width /= 2) {
        c.tile_outputs = tile_width(l.paired ? 2 * l.outputs : l.outputs, width, 64);
        tiles = rows * (l.paired ? TiledProduct<E, true>::tile_columns(l, c.tile_outputs)
                                 : TiledProduct<E, false>::tile_columns(l, c.tile_outputs));
    }
    launch("gist_encode (tiles)", encode_tiles<E>, std::min(tiles, most), kTileThreads, TileMemory::bytes<kTiledRows>(),
           stream, c);
}

// The first stage's products apart, its units beside them all the same.
template <class E>
void run_tiled(EncodeCall& c, void* stream) {
    using M = TensorMath<E>;
    c.beside = true;
    run_units<M>(c, 0, 1, false, stream);
    for (int s = 0; s < c.stages(); ++s) {
        const Step step = c.step(s);
        if (step == kAttend) {
            const int threads = block_threads(kAttendThreads);
            const int64_t units = static_cast<int64_t>(c.windows) * c.heads * query_tiles(c), warps = threads / 32;
            launch("gist_encode (attention)", attend_windows<E>, (units + warps - 1) / warps, threads, 0, stream, c);
        } else if (step == kPool || step == kMatch) {
            run_units<M>(c, s, s + 1, false, stream);
        } else {
            run_tiles<E>(c, s, stream);
        }
    }
}

template <class E, int MT>
void run_groups(EncodeCall& c, void* stream) {
    const int64_t groups = (c.windows + c.group - 1) / c.group;
    const int64_t blocks = std::min({groups, kMostResidentBlocks, static_cast<int64_t>(multiprocessors())});
    launch(MT == 4 ? "gist_encode (groups of 128)" : "gist_encode (groups of 64)", encode_resident<E, MT>, blocks,
           kTileThreads, resident_bytes<MT>(c.width), stream, c);
}

template <class E>
void run_resident(EncodeCall& c, const Plan& p, void* stream) {
    using M = TensorMath<E>;
    c.beside = true;
    run_units<M>(c, 0, 1, false, stream);
    if (p.rows == kTileRows<4>) {
        run_groups<E, 4>(c, stream);
    } else {
        run_groups<E, 2>(c, stream);
    }
    run_tiles<E>(c, c.stages() - 2, stream);
    run_units<M>(c, c.stages() - 1, c.stages(), false, stream);
}

template <class E>
void run(EncodeCall& c, const Plan& p, void* stream) {
    if (p.way == Way::kResident) {
        run_resident<E>(c, p, stream);
    } else if (p.way == Way::kTiled) {
        run_tiled<E>(c, stream);
    } else if (p.way == Way::kStreamed && fits_window(c)) {
        run_window<E>(c, stream);
    } else if (p.way == Way::kStreamed && c.half % 4 == 0) {
        run_stream<E>(c, stream);
    } else {
        run_units<TensorMath<E>>(c, 0, c.stages(), p.way == Way::kStreamed, stream);
    }
}

void gist_encode(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, void* workspace,
                 int64_t workspace_given, void* stream) {
    const Net net = check(w, a);
    check_workspace(workspace, workspace_given, workspace_bytes(w, a, net));
    const int64_t all = a.blocks.size[0];
    if (all == 0) return;
    const Plan p = plan_of(w, a, net, multiprocessors(), shared_limit());
    EncodeCall c = call_of(w, a, net, p, workspace);
    Watched watched;
    watch(watched, w, a, p, workspace);
    for (int64_t n = 0; n < all; n += p.windows) {
        c.blocks = static_cast<const char*>(a.blocks.data) + n * c.blocks_n;
        c.out = static_cast<char*>(a.out.data) + n * c.out_n;
        c.windows = static_cast<int32_t>(std::min(p.windows, all - n));
        c.rows = c.windows * c.rows_each;
        if (!p.tensor) {
            run_units<PlainMath>(c, 0, c.stages(), p.way == Way::kStreamed, stream);
        } else if (a.blocks.dtype == MC_F16) {
            run<Half>(c, p, stream);
        } else {
            run<Bfloat>(c, p, stream);
        }
    }
}

}  // namespace
}  // namespace mc::cuda

extern "C" int32_t mc_gist_encode_cuda_workspace(const mc_gist_encode_weights* weights, const mc_gist_encode_args* args,
                                                 int64_t* bytes) {
    return mc::guarded([&] {
        if (!weights) mc::invalid("weights: expected an address, got NULL");
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (!bytes) mc::invalid("bytes: expected an address, got NULL");
        const mc::Net net = mc::cuda::check(*weights, *args);
        *bytes = mc::cuda::workspace_bytes(*weights, *args, net);
    });
}

extern "C" int32_t mc_gist_encode_cuda(const mc_gist_encode_weights* weights, const mc_gist_encode_args* args,
                                       void* workspace, int64_t workspace_bytes, void* stream) {
    return mc::guarded([&] {
        if (!weights) mc::invalid("weights: expected an address, got NULL");
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::gist_encode(*weights, *args, workspace, workspace_bytes, stream);
    });
}
