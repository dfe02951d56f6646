// Checks of mc_fused_linear_cpu. Whatever could make the kernel leave the caller's memory is refused here.
#include "check.h"

#include <cmath>

#include "packed.h"

namespace mc {
namespace {

const char* address(const mc_tensor& x) { return x.ndim ? static_cast<const char*>(x.data) : nullptr; }
int64_t row_bytes(const mc_tensor& x) { return x.ndim ? x.stride[0] * dtype_bytes(x.dtype) : 0; }

void check_outputs(const mc_fused_linear_args& a) {
    const int64_t rows = a.x.size[0], parts = a.swiglu ? 2 : 1, outputs = a.weight.size[0] / parts;
    if (a.weight.size[0] % parts) {
        invalid("weight: expected an even number of rows with swiglu, got " + std::to_string(a.weight.size[0]));
    }
    check_view("out", a.out, 2);
    check_dtype("out", a.out, "x", a.x);
    check_sizes("out", a.out, {rows, outputs});
    check_no_overlap("out", a.out);
    if (a.residual.ndim) {
        check_view("residual", a.residual, 2);
        check_dtype("residual", a.residual, "x", a.x);
        check_sizes("residual", a.residual, {rows, outputs});
    }
}

void check_vector(const char* name, const mc_tensor& x, int64_t n) {
    if (!x.ndim) return;
    check_view(name, x, 1);
    check_sizes(name, x, {n});
}

void check_packed(const mc_packed_weight& p, const mc_tensor& weight, int64_t parts) {
    if (!p.data) return;
    if (p.bits != 4 && p.bits != 8) invalid("packed: expected codes of 4 or 8 bits, got " + std::to_string(p.bits));
    if (weight.dtype != MC_BF16 && weight.dtype != MC_F32) {
        throw Error(MC_INVALID_DTYPE,
                    "packed: expected a weight of bf16 or f32, got dtype code " + std::to_string(weight.dtype));
    }
    const int64_t inputs = weight.size[1];
    if (inputs % kPackedBlock) {
        invalid("packed: expected a weight of E % 32 = 0, got E = " + std::to_string(inputs));
    }
    if (weight.size[0] / parts % kPackedRows && parts > 1) {
        invalid("packed: expected a number of rows that is a multiple of 32 with swiglu, got " +
                std::to_string(weight.size[0]));
    }
    if (reinterpret_cast<uintptr_t>(p.data) % 4) invalid("packed: expected an address that is a multiple of 4");
}

// First byte, and the one behind the last.
void range(const mc_tensor& x, uintptr_t& first, uintptr_t& end) {
    int64_t last = 0;
    for (int i = 0; i < x.ndim; ++i) last += (x.size[i] - 1) * x.stride[i];
    first = reinterpret_cast<uintptr_t>(x.data);
    end = first + static_cast<uintptr_t>((last + 1) * dtype_bytes(x.dtype));
}

void check_apart(const mc_fused_linear_args& a) {
    const mc_tensor* const inputs[5] = {&a.x, &a.weight, &a.norm, &a.bias, &a.residual};
    static const char* const names[5] = {"x", "weight", "norm", "bias", "residual"};
    if (is_empty(a.out)) return;
    uintptr_t out, out_end, in, in_end;
    range(a.out, out, out_end);
    for (int i = 0; i < 5; ++i) {
        if (!inputs[i]->ndim || is_empty(*inputs[i])) continue;
        range(*inputs[i], in, in_end);
        if (in < out_end && out < in_end) {
            invalid(std::string("out: expected memory apart from ") + names[i] + ", got an overlap");
        }
    }
    if (!a.packed.data) return;
    const int64_t groups = (a.weight.size[0] + kPackedRows - 1) / kPackedRows, blocks = a.weight.size[1] / kPackedBlock;
    in = reinterpret_cast<uintptr_t>(a.packed.data);
    in_end = in + static_cast<uintptr_t>(groups * blocks * packed_block_bytes(a.packed.bits));
    if (in < out_end && out < in_end) invalid("out: expected memory apart from packed, got an overlap");
}

}  // namespace

Linear check_fused_linear(const mc_fused_linear_args& a) {
    if (a.struct_size != sizeof(mc_fused_linear_args)) {
        invalid("struct_size: expected " + std::to_string(sizeof(mc_fused_linear_args)) + ", got " +
                std::to_string(a.struct_size) + " (another version of mc_kernels.h?)");
    }
    check_view("x", a.x, 2);
    check_view("weight", a.weight, 2);
    check_sizes("weight", a.weight, {-1, a.x.size[1]});
    check_outputs(a);
    check_packed(a.packed, a.weight, a.swiglu ? 2 : 1);
    check_vector("norm", a.norm, a.x.size[1]);
    check_vector("bias", a.bias, a.weight.size[0]);
    if (a.norm.ndim && !(std::isfinite(a.eps) && a.eps >= 0)) {
        invalid("eps: expected a finite number >= 0, got " + std::to_string(a.eps));
    }
    check_apart(a);
    Linear x{};
    x.rows = a.x.size[0];
    x.inputs = a.x.size[1];
    x.outputs = a.out.size[1];
    x.x = address(a.x);
    x.weight = address(a.weight);
    x.norm = address(a.norm);
    x.bias = address(a.bias);
    x.residual = address(a.residual);
    x.out = static_cast<char*>(a.out.data);
    x.x_step = row_bytes(a.x);
    x.weight_step = row_bytes(a.weight);
    x.residual_step = row_bytes(a.residual);
    x.out_step = row_bytes(a.out);
    return x;
}

}  // namespace mc
