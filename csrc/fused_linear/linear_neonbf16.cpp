// Primitives of fused_linear with dot products of bytes of mixed signs, which processors have that multiply bf16; the others are NEON's.
#include "linear.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)

#include "vec_neon.h"
#include "bytes_neon.h"
#include "packed_impl.h"

namespace mc {

const LinearOps* linear_neonbf16() {
    static const LinearOps table = [] {
        LinearOps ops = *linear_neon();
        ops.name = "neonbf16";
        ops.to_bytes = to_bytes;
        ops.dot_packed = dot_packed;
        ops.packed_rows[0] = kFourBitRows;
        ops.packed_rows[1] = kEightBitRows;
        return ops;
    }();
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_neonbf16() { return nullptr; }

#endif
