// Primitives of fused_linear with NEON. On other architectures the level does not exist.
#include "linear.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"

namespace mc {
namespace {

// The next two vectors of a row; of bf16 the even elements, then the odd ones, as at all levels.
template <class T>
inline void load_pair(T t, const char* p, Vec& first, Vec& second) {
    const Pair x = load_pair(t, p);
    first = x.first;
    second = x.second;
}

}  // namespace
}  // namespace mc

#include "bytes_neon.h"
#include "packed_impl.h"
#include "linear_impl.h"
#include "narrow_impl.h"

namespace mc {

// What bf16 products need is for the levels above.
const LinearOps* linear_neon() {
    static const LinearOps table = [] {
        LinearOps ops = linear_table("neon");
        ops.narrow = narrow;
        return ops;
    }();
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_neon() { return nullptr; }

#endif
