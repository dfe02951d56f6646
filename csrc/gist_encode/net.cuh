// What the encoder's kernel is told, and the stages that a window goes through.
#pragma once

#include "device_types.cuh"
#include "turns.cuh"

namespace mc::cuda {

// Rows `row` bytes apart, layers `layer` bytes.
struct Matrix {
    const char* data;
    int64_t layer, row;

    MC_BOTH const char* at(int l, int64_t r = 0) const { return data + l * layer + r * row; }
    // From the start of a layer of less than 4 GB.
    MC_BOTH uint32_t offset(int r) const { return static_cast<uint32_t>(r) * static_cast<uint32_t>(row); }
};

// blocks -> kFirst, per layer kQkv .. kDown, kPool, kProject, kMatch -> out. A stage reads what the ones before it have
// written, nothing else of its own.
enum Step : int { kFirst, kQkv, kAttend, kAttendOut, kGateUp, kDown, kPool, kProject, kMatch };
constexpr int kLayerSteps = 5;

struct EncodeCall {
    const char* blocks;
    int64_t blocks_n, blocks_k, out_n, out_g;  // bytes
    char* out;
    Matrix mu, w_in, level, attn_norm, qkv, attn_out, ffn_norm, gate_up, down, final_norm, pool_q, w_out, gain;
    // Workspace. In the compute dtype: h [rows, Eg], turned [rows, 3 Eg], attention [rows, Eg], swiglu [rows, F], pooled
    // [N G, Eg]. fp32: y [N G, E], centred [N, E], phases [rows of a window, half of a head, cos and sin].
    char *h, *turned, *attention, *swiglu, *pooled;
    float *y, *centred, *phases;
    char* scratch;  // of blocks that windows stay with (resident.cuh), instead of h .. swiglu, which are nullptr then
    double log2_theta;
    float target_rms;
    int32_t windows, tokens, rows_each, rows;  // tokens: K; rows_each: with a class token; rows: of all windows
    int32_t embed, width, layers, heads, half, ffn, gists, pool, blocks_dtype, weights_dtype;
    int32_t first_stage, last_stage;
    int32_t tile_outputs;                        // of tiles
    int32_t group, scratch_columns, pass_heads;  // windows that stay together; how their block's scratch is used
    bool centres;                                // level 1
    bool beside;                                 // of the first stage only what is no product
    bool together;                               // all blocks run at the same time, all stages in this launch
    int32_t window_bytes;                        // of weights, of the block that holds most (window.cuh)
    uint32_t* flags;                             // of blocks, likewise

    MC_BOTH int stages() const { return 1 + kLayerSteps * layers + 3; }
    MC_BOTH Step step(int stage) const {
        if (stage == 0) return kFirst;
        const int after = stage - 1 - kLayerSteps * layers;
        return after < 0 ? static_cast<Step>(kQkv + (stage - 1) % kLayerSteps) : static_cast<Step>(kPool + after);
    }
    MC_BOTH int layer(int stage) const { return (stage - 1) / kLayerSteps; }
};

// An element of a dtype that is known when the kernel runs.
MC_DEVICE float any_element(int dtype, const char* row, int64_t i) {
    if (dtype == 0) return Float::widen(read_constant<uint32_t>(row + 4 * i));
    const uint16_t bits = read_constant<uint16_t>(row + 2 * i);
    return dtype == 1 ? Half::widen(bits) : Bfloat::widen(bits);
}

// Blocks and weights of one 16-bit dtype, whose rows begin on 16 bytes: products on tensor cores, activations in it.
template <class E>
struct TensorMath {
    using Store = E;
    static constexpr bool kTensor = true;
    static MC_DEVICE float weight(const EncodeCall&, const char* row, int64_t i) {
        return E::widen(read_constant<typename E::Bits>(row + 2 * i));
    }
    static MC_DEVICE float block(const EncodeCall& c, const char* row, int64_t i) { return weight(c, row, i); }
    static MC_DEVICE void store_out(const EncodeCall&, char* row, int64_t i, float x) {
        write(row + 2 * i, E::narrow(x));
    }
};

// Everything else: any dtypes and layout, products and activations in fp32.
struct PlainMath {
    using Store = Float;
    static constexpr bool kTensor = false;
    static MC_DEVICE float weight(const EncodeCall& c, const char* row, int64_t i) {
        return any_element(c.weights_dtype, row, i);
    }
    static MC_DEVICE float block(const EncodeCall& c, const char* row, int64_t i) {
        return any_element(c.blocks_dtype, row, i);
    }
    static MC_DEVICE void store_out(const EncodeCall& c, char* row, int64_t i, float x) {
        if (c.blocks_dtype == 0) {
            write(row + 4 * i, Float::narrow(x));
        } else {
            write(row + 2 * i, c.blocks_dtype == 1 ? Half::narrow(x) : Bfloat::narrow(x));
        }
    }
};

// An activation, in the workspace.
template <class M>
MC_DEVICE float load(const char* row, int64_t i) {
    using Bits = typename M::Store::Bits;
    return M::Store::widen(read<Bits>(row + i * sizeof(Bits)));
}
template <class M>
MC_DEVICE void store(char* row, int64_t i, float x) {
    using Bits = typename M::Store::Bits;
    write(row + i * sizeof(Bits), M::Store::narrow(x));
}
// Row r of activations of `width` numbers.
template <class M>
MC_DEVICE char* row_of(char* base, int64_t r, int width) {
    return base + r * width * static_cast<int64_t>(sizeof(typename M::Store::Bits));
}

MC_DEVICE float inverse_rms(float squares, int n) { return rsqrtf(squares / static_cast<float>(n) + 1e-12f); }

}  // namespace mc::cuda
