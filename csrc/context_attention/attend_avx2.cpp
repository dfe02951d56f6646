// Primitives of context_attention with AVX2, FMA and F16C. Without those flags (another architecture) the level does not exist.
#include "attend.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "attend_impl.h"

namespace mc {

const AttendOps* attend_avx2() {
    static const AttendOps table = attend_table("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::AttendOps* mc::attend_avx2() { return nullptr; }

#endif
