// Row primitives with AVX-512 F, BW, DQ and VL. Without those flags (another architecture) the level does not exist.
#include "rows.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "rows_impl.h"

namespace mc {

const RowOps* rows_avx512() {
    static const RowOps table = table_named("avx512");
    return &table;
}

}  // namespace mc

#else

const mc::RowOps* mc::rows_avx512() { return nullptr; }

#endif
