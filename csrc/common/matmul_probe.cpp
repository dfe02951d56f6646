// The matrix product of matmul.h as a function that tests can call: in the library, not in its header.
#include <vector>

#include "isa.h"
#include "tensor.h"

namespace mc {
namespace {

void probe(const mc_tensor& a, const mc_tensor& w, const mc_tensor& c, bool add) {
    check_view("a", a, 2);
    check_view("w", w, 2);
    check_view("c", c, 2);
    check_sizes("w", w, {-1, a.size[1]});
    check_sizes("c", c, {a.size[0], w.size[0]});
    const int type = a.dtype == MC_BF16 ? kBF16 : kF32;
    if (type != w.dtype || type != a.dtype || c.dtype != MC_F32) invalid("expected a and w as f32 or bf16, c as f32");
    const auto multiply = isa_level().matmul->multiply[type];
    if (!multiply) throw Error(MC_UNAVAILABLE, "no such product at this level");
    const int64_t k = a.size[1], step = product_row_bytes(type, k), bytes = dtype_bytes(type);
    std::vector<char> rows(static_cast<size_t>(a.size[0] * step)), panel(static_cast<size_t>(panel_bytes(type, k)));
    for (int64_t i = 0; i < a.size[0]; ++i) {
        std::memcpy(rows.data() + i * step, static_cast<char*>(a.data) + i * a.stride[0] * bytes,
                    static_cast<size_t>(k * bytes));
    }
    for (int64_t j = 0; j < w.size[0]; j += kPanel) {
        const int64_t n = w.size[0] - j < kPanel ? w.size[0] - j : kPanel;
        pack_panel(w.dtype, static_cast<char*>(w.data) + j * w.stride[0] * bytes, w.stride[0] * bytes, n, k, type,
                   panel.data());
        multiply({rows.data(), step, a.size[0], panel.data(), kPanel * 4, product_steps(type, k),
                  static_cast<float*>(c.data) + j, c.stride[0], n, add});
    }
    if (isa_level().matmul->finish) isa_level().matmul->finish();
}

}  // namespace
}  // namespace mc

// c [m, n] f32 (+)= a [m, k] w [n, k]^T, f32 or bf16.
extern "C" MC_API int32_t mc_probe_matmul(const mc_tensor* a, const mc_tensor* w, const mc_tensor* c, int32_t add) {
    return mc::guarded([&] { mc::probe(*a, *w, *c, add != 0); });
}
