// Row primitives with AVX2, FMA and F16C. Without those flags (another architecture) the level does not exist.
#include "rows.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "rows_impl.h"

namespace mc {

const RowOps* rows_avx2() {
    static const RowOps table = table_named("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::RowOps* mc::rows_avx2() { return nullptr; }

#endif
