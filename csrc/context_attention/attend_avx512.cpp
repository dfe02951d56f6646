// Primitives of context_attention with AVX-512. Without those flags (another architecture) the level does not exist.
#include "attend.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "attend_impl.h"

namespace mc {

const AttendOps* attend_avx512() {
    static const AttendOps table = attend_table("avx512");
    return &table;
}

}  // namespace mc

#else

const mc::AttendOps* mc::attend_avx512() { return nullptr; }

#endif
