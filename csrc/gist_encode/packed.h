// A net's weights as the kernel reads them: matrices in panels (matmul.h), all else in fp32, in one piece of memory.
#pragma once

#include "matmul.h"
#include "net.h"

namespace mc {

// A matrix [n, k] in panels.
struct Panels {
    const char* data;
    int64_t n, k, bytes;  // bytes of a panel
};

struct LayerWeights {
    const float *attn_norm, *ffn_norm;
    Panels qkv, out, gate, up, down;
};

class Packed {
public:
    // Matrices as `type` (kF32 or kBF16); nothing is read.
    Packed(const Net& net, int type, char* base);

    // What `pack` left at `base`. Throws Error if that is something else.
    static Packed open(const void* base, int64_t bytes);

    void pack(const mc_gist_encode_weights& w, int n_threads) const;

    int64_t bytes() const { return bytes_; }
    const Net& net() const { return net_; }
    int type() const { return type_; }
    const float* mu() const { return floats(mu_); }
    const float* level(int64_t level) const;
    const float* final_norm() const { return floats(final_norm_); }
    const float* pool_q(int64_t g) const { return floats(pool_q_) + g * net_.width; }
    float gain() const { return *floats(gain_); }
    Panels w_in() const { return panels(w_in_, net_.width, net_.embed); }
    Panels w_out() const { return panels(w_out_, net_.embed, net_.width); }
    LayerWeights layer(int64_t i) const;

private:
    // Offsets of a layer's parts from its beginning.
    struct LayerAt {
        int64_t attn_norm, ffn_norm, qkv, out, gate, up, down, bytes;
    };
    const float* floats(int64_t at) const { return reinterpret_cast<const float*>(base_ + at); }
    Panels panels(int64_t at, int64_t n, int64_t k) const { return {base_ + at, n, k, panel_bytes(type_, k)}; }

    Net net_;
    int type_;
    char* base_;
    int64_t mu_, level_emb_, final_norm_, pool_q_, gain_, w_in_, w_out_, layers_, bytes_;
    LayerAt at_;
};

}  // namespace mc
