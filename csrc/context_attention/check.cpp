// Checks of mc_context_attention_cpu and mc_context_attention_cuda. Whatever could make the kernel leave the caller's memory is refused here.
#include "check.h"

#include <cmath>

namespace mc {
namespace {

void check_tensors(const mc_context_attention_args& a, bool fp8) {
    check_view("q", a.q, 4);
    check_view("k", a.k, 4, fp8);
    check_view("v", a.v, 4, fp8);
    check_view("out", a.out, 4);
    if (a.k.dtype == MC_F8E4M3) {
        check_dtype("v", a.v, "k", a.k);
    } else {
        check_dtype("k", a.k, "q", a.q);
        check_dtype("v", a.v, "q", a.q);
    }
    check_dtype("out", a.out, "q", a.q);
    const int64_t *q = a.q.size, *k = a.k.size;
    check_sizes("k", a.k, {q[0], -1, -1, q[3]});
    check_sizes("v", a.v, {q[0], k[1], k[2], q[3]});
    check_sizes("out", a.out, {q[0], q[1], q[2], q[3]});
    check_no_overlap("out", a.out);
    if (q[3] < 1) invalid("q: expected D >= 1, got shape " + shape_text(a.q));
    if (k[1] < 1 || q[1] % k[1]) {
        invalid("k: expected a number of heads that divides Hq = " + std::to_string(q[1]) + ", got " +
                std::to_string(k[1]));
    }
    const mc_tensor* const inputs[3] = {&a.q, &a.k, &a.v};
    static const char* const names[3] = {"q", "k", "v"};
    for (int i = 0; i < 3; ++i) {
        if (!is_empty(a.out) && !is_empty(*inputs[i]) && inputs[i]->data == a.out.data) {
            invalid(std::string("out: expected memory apart from ") + names[i] + ", got the same address");
        }
    }
}

void check_arrays(const mc_context_attention_args& a) {
    const int64_t queries = a.q.size[0] * a.q.size[2], slots = a.k.size[0] * a.k.size[2];
    if (queries && !a.q_pos) invalid("q_pos: expected an array [B, T], got NULL");
    if (slots && !a.kv_pos) invalid("kv_pos: expected an array [B, S], got NULL");
    if (queries && a.q.size[1] && !a.lse) invalid("lse: expected an array [B, Hq, T], got NULL");
    const float* const scales[2] = {a.k_scale, a.v_scale};
    static const char* const names[2] = {"k_scale", "v_scale"};
    for (int i = 0; i < 2; ++i) {
        if ((scales[i] != nullptr) == (a.k.dtype == MC_F8E4M3)) continue;
        invalid(std::string(names[i]) + (scales[i] ? ": expected NULL with keys that are not MC_F8E4M3, got an array"
                                                   : ": expected an array [Hkv] with MC_F8E4M3 keys, got NULL"));
    }
}

void check_rotation(const mc_context_attention_args& a) {
    const int64_t most = a.inv_freq ? a.q.size[3] / 2 : 0;
    if (a.half < 0 || a.half > most) {
        invalid("half: expected 0.." + std::to_string(most) + (a.inv_freq ? " (D/2)" : " without inv_freq") + ", got " +
                std::to_string(a.half));
    }
    if (a.inv_freq && !std::isfinite(a.attention_scaling)) {
        invalid("attention_scaling: expected a finite number, got " + std::to_string(a.attention_scaling));
    }
    if (a.sigma && !a.inv_freq) invalid("sigma: expected NULL without inv_freq (it damps rotary bands), got an array");
    if (!std::isfinite(a.scale)) invalid("scale: expected a finite number, got " + std::to_string(a.scale));
}

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

void byte_strides(const mc_tensor& x, int64_t* out) {
    for (int i = 0; i < 3; ++i) out[i] = x.stride[i] * dtype_bytes(x.dtype);
}

}  // namespace

Attention check_context_attention(const mc_context_attention_args& a, bool fp8) {
    if (a.struct_size != sizeof(mc_context_attention_args)) {
        invalid("struct_size: expected " + std::to_string(sizeof(mc_context_attention_args)) + ", got " +
                std::to_string(a.struct_size) + " (another version of mc_kernels.h?)");
    }
    check_tensors(a, fp8);
    check_arrays(a);
    check_rotation(a);
    Attention x{};
    x.dtype = a.q.dtype;
    x.fp8 = a.k.dtype == MC_F8E4M3;
    x.batch = a.q.size[0];
    x.heads = a.q.size[1];
    x.queries = a.q.size[2];
    x.kv_heads = a.k.size[1];
    x.slots = a.k.size[2];
    x.rows = x.heads / x.kv_heads * x.queries;
    x.interleaved = a.interleaved != 0;
    x.row.dims = a.q.size[3];
    x.row.half = a.half;
    x.row.width = padded(x.interleaved ? 2 * a.half : a.half);
    x.row.padded = (x.interleaved ? 1 : 2) * x.row.width + padded(x.row.dims - 2 * a.half);
    byte_strides(a.q, x.q_stride);
    byte_strides(a.k, x.k_stride);
    byte_strides(a.v, x.v_stride);
    byte_strides(a.out, x.out_stride);
    return x;
}

}  // namespace mc
