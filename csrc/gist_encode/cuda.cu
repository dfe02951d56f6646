// mc_gist_encode_cuda: checks, workspace, chunks of windows, launches. The kernel: kernel.cuh.
#include <algorithm>
#include <cmath>

#include "host_checks.h"
#include "kernel.cuh"
#include "launch.cuh"
#include "net.h"

namespace mc::cuda {
namespace {

// Rows that go through in one launch, and in bulk: the latter bounds the workspace.
constexpr int64_t kStreamed = 264, kChunkRows = 32768;

struct Layout {
    bool tensor, streamed;
    int64_t windows;  // of a chunk
    int64_t h, turned, attention, swiglu, pooled, y, centred, phases, bytes;
};

bool dense_on_16(const mc_gist_encode_weights& w) {
    for (const mc_tensor* x :
         {&w.w_in, &w.attn_norm, &w.qkv, &w.attn_out, &w.ffn_norm, &w.gate_up, &w.down, &w.w_out}) {
        if (!rows_on_16(*x)) return false;
    }
    return true;
}

Layout layout_of(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net) {
    Layout l{};
    const int64_t rows_each = a.blocks.size[1] + (net.pool == Pool::kCls), all = a.blocks.size[0];
    l.tensor = a.blocks.dtype == w.w_in.dtype && a.blocks.dtype != MC_F32 && net.embed % 8 == 0 && net.width % 8 == 0 &&
               net.ffn % 8 == 0 && rows_on_16(a.blocks) && dense_on_16(w);
    l.streamed = all * rows_each <= kStreamed;
    l.windows = std::min(all, std::max<int64_t>(kChunkRows / rows_each, 1));
    const int64_t rows = l.windows * rows_each, gists = l.windows * net.gists, bytes = l.tensor ? 2 : 4;
    const auto take = [&](int64_t& at, int64_t n, int64_t each) {
        at = l.bytes;
        l.bytes += (n * each + 255) / 256 * 256;
    };
    if (all == 0) return l;
    take(l.h, rows * net.width, bytes);
    take(l.turned, rows * 3 * net.width, bytes);
    take(l.attention, rows * net.width, bytes);
    take(l.swiglu, rows * net.ffn, bytes);
    take(l.pooled, gists * net.width, bytes);
    take(l.y, gists * net.embed, 4);
    take(l.centred, l.windows * net.embed, 4);
    take(l.phases, rows_each * net.head_dim(), 4);
    return l;
}

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
    narrow("blocks", (kChunkRows + a.blocks.size[1]) * std::max({net.head_dim(), net.gists, 2 * net.heads}));
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

EncodeCall call_of(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Net& net, const Layout& l,
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
    c.h = memory + l.h;
    c.turned = memory + l.turned;
    c.attention = memory + l.attention;
    c.swiglu = memory + l.swiglu;
    c.pooled = memory + l.pooled;
    c.y = reinterpret_cast<float*>(memory + l.y);
    c.centred = reinterpret_cast<float*>(memory + l.centred);
    c.phases = reinterpret_cast<float*>(memory + l.phases);
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

void watch(Watched& watched, const mc_gist_encode_weights& w, const mc_gist_encode_args& a, const Layout& l,
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
    watched.array("workspace", workspace, l.bytes, true);
}

// Blocks that a stage can use, at most.
int64_t most_units(const EncodeCall& c, int stage) {
    const Step step = c.step(stage);
    return units_of(c, step, Linear(c, step, 0));
}

template <class M>
void run(EncodeCall& c, const Layout& l, void* stream) {
    const int threads = block_threads(kEncodeThreads), stages = c.stages();
    const int64_t shared = std::max({ProductMemory::bytes(threads / 32), AttendMemory::bytes(2 * c.half, threads / 32),
                                     2 * shared_bytes_of<float>(c.rows_each)});
    int64_t most = 1;
    for (int s = 0; s < stages; ++s) most = std::max(most, most_units(c, s));
    if (l.streamed) {
        c.together = true;
        c.first_stage = 0;
        c.last_stage = stages;
        launch("gist_encode (streaming)", encode<M>, std::min<int64_t>(most, multiprocessors()), threads, shared,
               stream, c, true);
        return;
    }
    for (int s = 0; s < stages; ++s) {
        c.first_stage = s;
        c.last_stage = s + 1;
        launch("gist_encode (bulk)", encode<M>, most_units(c, s), threads, shared, stream, c);
    }
}

void gist_encode(const mc_gist_encode_weights& w, const mc_gist_encode_args& a, void* workspace,
                 int64_t workspace_bytes, void* stream) {
    const Net net = check(w, a);
    const Layout l = layout_of(w, a, net);
    check_workspace(workspace, workspace_bytes, l.bytes);
    const int64_t all = a.blocks.size[0];
    if (all == 0) return;
    EncodeCall c = call_of(w, a, net, l, workspace);
    Watched watched;
    watch(watched, w, a, l, workspace);
    for (int64_t n = 0; n < all; n += l.windows) {
        c.blocks = static_cast<const char*>(a.blocks.data) + n * c.blocks_n;
        c.out = static_cast<char*>(a.out.data) + n * c.out_n;
        c.windows = static_cast<int32_t>(std::min(l.windows, all - n));
        c.rows = c.windows * c.rows_each;
        if (!l.tensor) {
            run<PlainMath>(c, l, stream);
        } else if (a.blocks.dtype == MC_F16) {
            run<TensorMath<Half>>(c, l, stream);
        } else {
            run<TensorMath<Bfloat>>(c, l, stream);
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
        *bytes = mc::cuda::layout_of(*weights, *args, net).bytes;
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
