// Primitives of fused_linear with the dot products of bytes; the others are NEON's.
#include "linear.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include "vec_neon.h"
#include "bytes_neon.h"
#include "packed_impl.h"

namespace mc {

const LinearOps* linear_neondot() {
    static const LinearOps table = with_packed(*linear_neon(), "neondot");
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_neondot() { return nullptr; }

#endif
