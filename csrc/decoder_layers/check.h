// The arguments of decoder_layers, checked, and the calls that a layer is made of.
#pragma once

#include <vector>

#include "scratch.h"
#include "tensor.h"

namespace mc {

// A layer as calls of other ops, in this order. Their tensors lie in the caller's memory and in `Between`.
struct LayerCalls {
    mc_fused_linear_args qkv;
    mc_context_attention_args attention;
    mc_fused_linear_args out, gate_up, down;
};

struct DecoderShape {
    int64_t layers, batch, length, embed, heads, kv_heads, dims, ffn, slots, vocab;  // vocab: 0 without a head
    int64_t rows() const { return batch * length; }
    int64_t qkv_rows() const { return (heads + 2 * kv_heads) * dims; }
};

// What passes between the parts of a layer, in x's dtype: [B T, ...], rows close together.
struct Between {
    Scratch<char> qkv, attended, middle, inner, stream[2];  // stream: x after every other layer
    Scratch<float> lse;                                     // [B, Hq, T]
};

struct DecoderCall {
    DecoderShape shape;
    Between between;
    std::vector<LayerCalls> layers;
    mc_fused_linear_args head;  // with a head
};

// Throws Error for whatever the ABI promises to refuse, std::bad_alloc. Nothing has been written then.
DecoderCall check_decoder_layers(const mc_decoder_layers_args& a);

}  // namespace mc
