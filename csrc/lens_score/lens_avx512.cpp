// Primitives of lens_score with AVX-512. Without those flags (another architecture) the level does not exist.
#include "lens.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "lens_impl.h"

namespace mc {

const LensOps* lens_avx512() {
    static const LensOps table = lens_table("avx512");
    return &table;
}

}  // namespace mc

#else

const mc::LensOps* mc::lens_avx512() { return nullptr; }

#endif
