// Which primitives of fused_linear serve a level.
#include "choice.h"

namespace mc {

const LinearOps& linear_ops(const IsaLevel& level, const char* op) {
    return ops_of(level, op, {linear_avx512bf16(), linear_avx512(), linear_avx2(), linear_neonbf16(), linear_neondot(),
                              linear_neon(), linear_scalar()});
}

}  // namespace mc
