// Primitives of fused_linear with the dot products of bytes; the others are NEON's.
#include "linear.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include "vec_neon.h"
#include "bytes_neon.h"
#include "packed_impl.h"

namespace mc {

const LinearOps* linear_neondot() {
    static const LinearOps table = [] {
        LinearOps ops = *linear_neon();
        ops.name = "neondot";
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

const mc::LinearOps* mc::linear_neondot() { return nullptr; }

#endif
