// Primitives of fused_linear in portable C++.
#include "linear.h"
#include "vec_scalar.h"

namespace mc {
namespace {

// The next two vectors of a row; of bf16 the even elements, then the odd ones, as at all levels.
template <class T>
inline void load_pair(T t, const char* p, Vec& first, Vec& second) {
    first = Vec::load(t, p);
    second = Vec::load(t, p + Vec::kWidth * T::kBytes);
}
inline void load_pair(BF16 t, const char* p, Vec& first, Vec& second) {
    uint16_t raw[2 * Vec::kWidth];
    std::memcpy(raw, p, sizeof raw);
    for (int i = 0; i < Vec::kWidth; ++i) {
        first.v[i] = decode(t, raw[2 * i]);
        second.v[i] = decode(t, raw[2 * i + 1]);
    }
}

}  // namespace
}  // namespace mc

#include "bytes_scalar.h"
#include "packed_impl.h"
#include "linear_impl.h"
#include "narrow_impl.h"

namespace mc {

// What bf16 products need is for emulated matrix tiles.
const LinearOps* linear_scalar() {
    static const LinearOps table = [] {
        LinearOps ops = linear_table("scalar");
        ops.narrow = narrow;
        return ops;
    }();
    return &table;
}

}  // namespace mc
