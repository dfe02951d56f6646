// Checks of gist_encode. Whatever could make the kernel leave the caller's memory is refused here.
#include <cmath>

#include "net.h"

namespace mc {
namespace {

void check_struct(size_t got, size_t want) {
    if (got != want) {
        invalid("struct_size: expected " + std::to_string(want) + ", got " + std::to_string(got) +
                " (another version of mc_kernels.h?)");
    }
}

void check_positive(const char* name, double x) {
    if (!(std::isfinite(x) && x > 0)) {
        invalid(std::string(name) + ": expected a positive number, got " + std::to_string(x));
    }
}

}  // namespace

Net check_weights(const mc_gist_encode_weights& w) {
    check_struct(w.struct_size, sizeof w);
    const struct {
        const char* name;
        const mc_tensor& x;
        int ndim;
    } all[] = {
        {"w_in", w.w_in, 2},
        {"mu", w.mu, 1},
        {"level_emb", w.level_emb, 2},
        {"attn_norm", w.attn_norm, 2},
        {"qkv", w.qkv, 3},
        {"attn_out", w.attn_out, 3},
        {"ffn_norm", w.ffn_norm, 2},
        {"gate_up", w.gate_up, 3},
        {"down", w.down, 3},
        {"final_norm", w.final_norm, 1},
        {"pool_q", w.pool_q, 2},
        {"w_out", w.w_out, 2},
        {"gain", w.gain, 1},
    };
    for (const auto& one : all) {
        check_view(one.name, one.x, one.ndim);
        check_dtype(one.name, one.x, "w_in", w.w_in);
    }
    const int64_t e = w.w_in.size[1], width = w.w_in.size[0], layers = w.qkv.size[0], f = w.down.size[2];
    check_sizes("mu", w.mu, {e});
    check_sizes("level_emb", w.level_emb, {-1, width});
    check_sizes("attn_norm", w.attn_norm, {layers, width});
    check_sizes("qkv", w.qkv, {layers, 3 * width, width});
    check_sizes("attn_out", w.attn_out, {layers, width, width});
    check_sizes("ffn_norm", w.ffn_norm, {layers, width});
    check_sizes("gate_up", w.gate_up, {layers, 2 * f, width});
    check_sizes("down", w.down, {layers, width, f});
    check_sizes("final_norm", w.final_norm, {width});
    check_sizes("pool_q", w.pool_q, {-1, width});
    check_sizes("w_out", w.w_out, {e, width});
    check_sizes("gain", w.gain, {1});
    for (const auto& one : {w.w_in, w.level_emb, w.pool_q}) {
        if (is_empty(one)) invalid("w_in, level_emb, pool_q: expected sizes >= 1, got shape " + shape_text(one));
    }
    if (layers && f < 1) invalid("down: expected F >= 1, got shape " + shape_text(w.down));
    if (w.n_heads < 1 || width % (2 * w.n_heads)) {
        invalid("n_heads: expected heads of even width in Eg = " + std::to_string(width) + ", got " +
                std::to_string(w.n_heads));
    }
    if (w.pool != MC_POOL_SOFTMAX && w.pool != MC_POOL_MEAN && w.pool != MC_POOL_CLS) {
        invalid("pool: expected MC_POOL_SOFTMAX, MC_POOL_MEAN or MC_POOL_CLS, got " + std::to_string(w.pool));
    }
    if (w.pool != MC_POOL_SOFTMAX && w.pool_q.size[0] != 1) {
        invalid("pool_q: expected G = 1 for this pool, got shape " + shape_text(w.pool_q));
    }
    check_positive("rope_theta", w.rope_theta);
    check_positive("target_rms", w.target_rms);
    return {e,
            width,
            layers,
            w.n_heads,
            f,
            w.pool_q.size[0],
            w.level_emb.size[0],
            w.rope_theta,
            w.target_rms,
            static_cast<Pool>(w.pool)};
}

void check_windows(const mc_gist_encode_args& a, const Net& net) {
    check_struct(a.struct_size, sizeof a);
    check_view("blocks", a.blocks, 3);
    check_view("out", a.out, 3);
    check_dtype("out", a.out, "blocks", a.blocks);
    check_sizes("blocks", a.blocks, {-1, -1, net.embed});
    check_sizes("out", a.out, {a.blocks.size[0], net.gists, net.embed});
    check_no_overlap("out", a.out);
    if (a.blocks.size[1] < 1) invalid("blocks: expected K >= 1, got shape " + shape_text(a.blocks));
    if (a.level < 1) invalid("level: expected at least 1, got " + std::to_string(a.level));
    if (!is_empty(a.out) && a.out.data == a.blocks.data) {
        invalid("out: expected memory apart from blocks, got the same address");
    }
}

}  // namespace mc
