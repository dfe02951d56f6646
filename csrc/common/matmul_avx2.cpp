// Matrix products with AVX2 and FMA. Without those flags (another architecture) the level does not exist.
#include "matmul.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "matmul_impl.h"

namespace mc {

const MatmulOps* matmul_avx2() {
    static const MatmulOps table = {{multiply<FloatStep, 2, 6>, nullptr, nullptr}, nullptr, false};
    return &table;
}

}  // namespace mc

#else

const mc::MatmulOps* mc::matmul_avx2() { return nullptr; }

#endif
