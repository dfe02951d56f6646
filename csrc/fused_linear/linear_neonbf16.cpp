// Primitives of fused_linear with dot products of bytes of mixed signs, which Arms have that multiply bf16; the others are
// NEON's.
#include "linear.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)

#include "vec_neon.h"
#include "bytes_neon.h"
#include "packed_impl.h"

namespace mc {

const LinearOps* linear_neonbf16() {
    static const LinearOps table = with_packed(*linear_neon(), "neonbf16");
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_neonbf16() { return nullptr; }

#endif
