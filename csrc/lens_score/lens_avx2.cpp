// Primitives of lens_score with AVX2, FMA and F16C. Without those flags (another architecture) the level does
// not exist.
#include "lens.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "lens_impl.h"

namespace mc {

const LensOps* lens_avx2() {
    static const LensOps table = lens_table("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::LensOps* mc::lens_avx2() { return nullptr; }

#endif
