// Checks of mc_decoder_layers_cpu. Whatever could make the kernel leave the caller's memory is refused here: what the
// calls of other ops do not see by those calls' own checks.
#include "check.h"

#include <cmath>

#include "../context_attention/check.h"
#include "../fused_linear/check.h"

namespace mc {
namespace {

std::string number(size_t n) { return std::to_string(n); }
std::string number(int64_t n) { return std::to_string(n); }

void check_struct(const mc_decoder_layers_args& a) {
    if (a.struct_size != sizeof(mc_decoder_layers_args)) {
        invalid("struct_size: expected " + number(sizeof(mc_decoder_layers_args)) + ", got " + number(a.struct_size) +
                " (another version of mc_kernels.h?)");
    }
    if (a.layer_size != sizeof(mc_decoder_layer)) {
        invalid("layer_size: expected " + number(sizeof(mc_decoder_layer)) + ", got " + number(a.layer_size) +
                " (another version of mc_kernels.h?)");
    }
    if (a.n_layers < 0) invalid("n_layers: expected at least 0, got " + number(a.n_layers));
    if (a.n_layers && !a.layers) invalid("layers: expected an array of " + number(a.n_layers) + ", got NULL");
    if (!(std::isfinite(a.eps) && a.eps >= 0)) {
        invalid("eps: expected a finite number >= 0, got " + std::to_string(a.eps));
    }
}

DecoderShape shape_of(const mc_decoder_layers_args& a) {
    check_view("x", a.x, 2);
    check_view("k", a.k, 5);
    check_view("v", a.v, 5);
    check_view("out", a.out, 2);
    DecoderShape s{};
    s.layers = a.n_layers;
    s.batch = a.k.size[1];
    s.length = s.batch ? a.x.size[0] / s.batch : 0;
    s.embed = a.x.size[1];
    s.kv_heads = a.k.size[2];
    s.slots = a.k.size[3];
    s.dims = a.k.size[4];
    check_sizes("x", a.x, {s.rows(), -1});
    check_sizes("k", a.k, {s.layers, -1, -1, -1, -1});
    check_sizes("v", a.v, {s.layers, s.batch, s.kv_heads, s.slots, s.dims});
    check_sizes("out", a.out, {s.rows(), s.embed});
    check_dtype("k", a.k, "x", a.x);
    check_dtype("v", a.v, "x", a.x);
    check_dtype("out", a.out, "x", a.x);
    check_no_overlap("k", a.k);
    check_no_overlap("v", a.v);
    check_no_overlap("out", a.out);
    if (a.final_norm.ndim) {
        check_view("final_norm", a.final_norm, 1);
        check_sizes("final_norm", a.final_norm, {s.embed});
    }
    if (s.kv_heads < 1 || s.dims < 1) invalid("k: expected Hkv >= 1 and D >= 1, got shape " + shape_text(a.k));
    if (!is_empty(a.k) && a.k.data == a.v.data) invalid("v: expected memory apart from k, got the same address");
    if (!is_empty(a.out) && a.out.data == a.x.data) invalid("out: expected memory apart from x, got the same address");
    return s;
}

void check_head(const mc_decoder_layers_args& a, DecoderShape& s) {
    if (!a.head.ndim != !a.logits.ndim) invalid("logits: expected them with a head, and no others");
    if (!a.head.ndim) return;
    check_view("head", a.head, 2);
    check_view("logits", a.logits, 2);
    s.vocab = a.head.size[0];
    check_sizes("head", a.head, {-1, s.embed});
    check_sizes("logits", a.logits, {s.batch, s.vocab});
    check_dtype("logits", a.logits, "x", a.x);
    check_no_overlap("logits", a.logits);
    if (s.batch && !s.length) invalid("logits: expected at least one entry of each sequence, got none");
}

// Heads and width, which the first layer's weights tell; all others must have them too.
void shape_of_weights(const mc_decoder_layers_args& a, DecoderShape& s) {
    if (!s.layers) return;
    const mc_decoder_layer& first = a.layers[0];
    check_view("qkv", first.qkv, 2);
    check_view("gate_up", first.gate_up, 2);
    const int64_t rows = first.qkv.size[0];
    s.heads = rows / s.dims - 2 * s.kv_heads;
    if (rows % s.dims || s.heads < s.kv_heads || s.heads % s.kv_heads) {
        invalid("qkv: expected (Hq + 2 Hkv) D rows with Hkv = " + number(s.kv_heads) + " dividing Hq and D = " +
                number(s.dims) + ", got " + number(rows));
    }
    s.ffn = first.gate_up.size[0] / 2;
}

void check_arrays(const mc_decoder_layers_args& a, const DecoderShape& s) {
    if (a.used < 0 || a.used > s.slots) invalid("used: expected 0.." + number(s.slots) + " (S), got " + number(a.used));
    if (s.rows() && !a.positions) invalid("positions: expected an array [B, T], got NULL");
    if (s.rows() && !a.slots) invalid("slots: expected an array [B, T], got NULL");
    for (int64_t i = 0; i < s.rows(); ++i) {
        if (a.slots[i] < 0 || a.slots[i] >= s.slots) {
            invalid("slots: expected 0.." + number(s.slots - 1) + " (S - 1), got " + number(a.slots[i]));
        }
    }
}

void check_heads_norm(const char* name, const mc_tensor& x, const mc_tensor& other, int64_t dims) {
    if (!x.ndim != !other.ndim) invalid(std::string(name) + ": expected q_norm and k_norm, or none of them");
    if (!x.ndim) return;
    check_view(name, x, 1);
    check_sizes(name, x, {dims});
}

mc_tensor rows_of(void* data, int32_t dtype, int64_t rows, int64_t width) {
    mc_tensor out{};
    out.data = data;
    out.dtype = dtype;
    out.ndim = 2;
    out.size[0] = rows;
    out.size[1] = width;
    out.stride[0] = width;
    out.stride[1] = 1;
    return out;
}

// [B, T, heads, D], rows `width` elements apart, as [B, heads, T, D].
mc_tensor by_head(void* data, int32_t dtype, const DecoderShape& s, int64_t width) {
    mc_tensor out{};
    out.data = data;
    out.dtype = dtype;
    out.ndim = 4;
    const int64_t sizes[4] = {s.batch, s.heads, s.length, s.dims}, strides[4] = {s.length * width, s.dims, width, 1};
    for (int i = 0; i < 4; ++i) {
        out.size[i] = sizes[i];
        out.stride[i] = strides[i];
    }
    return out;
}

// Slots [0, used) of a layer.
mc_tensor seen(const mc_tensor& x, int64_t layer, int64_t used) {
    mc_tensor out{};
    out.data = is_empty(x) ? x.data : static_cast<char*>(x.data) + layer * x.stride[0] * dtype_bytes(x.dtype);
    out.dtype = x.dtype;
    out.ndim = 4;
    for (int i = 0; i < 4; ++i) {
        out.size[i] = x.size[i + 1];
        out.stride[i] = x.stride[i + 1];
    }
    out.size[2] = used;
    return out;
}

// The layer's weights must be present: an absent norm would be none.
void check_present(const mc_decoder_layer& w, const DecoderShape& s) {
    check_view("attention_norm", w.attention_norm, 1);
    check_view("ffn_norm", w.ffn_norm, 1);
    const auto matrix = [](const char* name, const mc_tensor& x, int64_t outputs, int64_t inputs) {
        check_view(name, x, 2);
        check_sizes(name, x, {outputs, inputs});
    };
    matrix("qkv", w.qkv, s.qkv_rows(), s.embed);
    matrix("out", w.out, s.embed, s.heads * s.dims);
    matrix("gate_up", w.gate_up, 2 * s.ffn, s.embed);
    matrix("down", w.down, s.embed, s.ffn);
    check_heads_norm("q_norm", w.q_norm, w.k_norm, s.dims);
    check_heads_norm("k_norm", w.k_norm, w.q_norm, s.dims);
}

mc_fused_linear_args linear(const mc_tensor& x, const mc_tensor& weight, const mc_packed_weight& packed,
                            const mc_tensor& bias, const mc_tensor& out) {
    mc_fused_linear_args call{};
    call.struct_size = sizeof call;
    call.x = x;
    call.weight = weight;
    call.packed = packed;
    call.bias = bias;
    call.out = out;
    return call;
}

LayerCalls calls_of(const mc_decoder_layers_args& a, const DecoderShape& s, const Between& m, int64_t layer) {
    const mc_decoder_layer& w = a.layers[layer];
    const int32_t dtype = a.x.dtype;
    const auto stream = [&](int64_t i) { return rows_of(m.stream[i % 2].get(), dtype, s.rows(), s.embed); };
    const mc_tensor x = layer ? stream(layer - 1) : a.x, y = layer + 1 < s.layers ? stream(layer) : a.out;
    const mc_tensor qkv = rows_of(m.qkv.get(), dtype, s.rows(), s.qkv_rows());
    const mc_tensor attended = rows_of(m.attended.get(), dtype, s.rows(), s.heads * s.dims);
    const mc_tensor middle = rows_of(m.middle.get(), dtype, s.rows(), s.embed);
    const mc_tensor inner = rows_of(m.inner.get(), dtype, s.rows(), s.ffn), none{};
    LayerCalls out{};
    out.qkv = linear(x, w.qkv, w.qkv_packed, w.qkv_bias, qkv);
    out.qkv.norm = w.attention_norm;
    out.qkv.eps = a.eps;
    out.attention.struct_size = sizeof out.attention;
    out.attention.q = by_head(qkv.data, dtype, s, s.qkv_rows());
    out.attention.k = seen(a.k, layer, a.used);
    out.attention.v = seen(a.v, layer, a.used);
    out.attention.q_pos = a.positions;
    out.attention.kv_pos = a.kv_pos;
    out.attention.inv_freq = a.inv_freq;
    out.attention.half = a.half;
    out.attention.interleaved = a.interleaved;
    out.attention.attention_scaling = a.attention_scaling;
    out.attention.kv_bias = a.kv_bias;
    out.attention.scale = a.scale;
    out.attention.out = by_head(attended.data, dtype, s, s.heads * s.dims);
    out.attention.lse = m.lse.get();
    out.attention.mass = a.mass ? a.mass + layer * s.batch * a.used : nullptr;
    out.out = linear(attended, w.out, w.out_packed, w.out_bias, middle);
    out.out.residual = x;
    out.gate_up = linear(middle, w.gate_up, w.gate_up_packed, none, inner);
    out.gate_up.norm = w.ffn_norm;
    out.gate_up.eps = a.eps;
    out.gate_up.swiglu = 1;
    out.down = linear(inner, w.down, w.down_packed, none, y);
    out.down.residual = middle;
    return out;
}

}  // namespace

DecoderCall check_decoder_layers(const mc_decoder_layers_args& a) {
    check_struct(a);
    DecoderCall call{shape_of(a), {}, {}, {}};
    DecoderShape& s = call.shape;
    check_head(a, s);
    shape_of_weights(a, s);
    check_arrays(a, s);
    for (int64_t l = 0; l < s.layers; ++l) check_present(a.layers[l], s);
    const auto room = [&](int64_t width) { return Scratch<char>(s.rows() * width * dtype_bytes(a.x.dtype)); };
    call.between = {room(s.qkv_rows()), room(s.heads * s.dims), room(s.embed), room(s.ffn),
                    {room(s.embed), room(s.embed)}, Scratch<float>(s.rows() * s.heads)};
    call.layers.reserve(static_cast<size_t>(s.layers));
    for (int64_t l = 0; l < s.layers; ++l) {
        call.layers.push_back(calls_of(a, s, call.between, l));
        const LayerCalls& layer = call.layers.back();
        check_fused_linear(layer.qkv);
        check_context_attention(layer.attention);
        check_fused_linear(layer.out);
        check_fused_linear(layer.gate_up);
        check_fused_linear(layer.down);
    }
    if (a.head.ndim) {
        mc_tensor last = a.out;  // of each sequence
        last.size[0] = s.batch;
        last.stride[0] *= s.length;
        if (s.batch) last.data = static_cast<char*>(last.data) + (s.length - 1) * a.out.stride[0] * dtype_bytes(a.x.dtype);
        call.head = linear(last, a.head, a.head_packed, {}, a.logits);
        check_fused_linear(call.head);
    }
    return call;
}

}  // namespace mc
