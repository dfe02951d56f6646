// Matrix products with NEON. On other architectures the level does not exist.
#include "matmul.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"
#include "matmul_impl.h"

namespace mc {

const MatmulOps* matmul_neon() {
    static const MatmulOps table = {{multiply<FloatStep, 4, 5>, nullptr, nullptr}, nullptr, false};
    return &table;
}

}  // namespace mc

#else

const mc::MatmulOps* mc::matmul_neon() { return nullptr; }

#endif
