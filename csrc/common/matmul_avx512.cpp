// Matrix products with AVX-512. Without those flags (another architecture) the level does not exist.
#include "matmul.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "matmul_impl.h"

namespace mc {

const MatmulOps* matmul_avx512() {
    static const MatmulOps table = {{multiply<FloatStep, 2, 14>, nullptr, nullptr}, nullptr, false};
    return &table;
}

}  // namespace mc

#else

const mc::MatmulOps* mc::matmul_avx512() { return nullptr; }

#endif
