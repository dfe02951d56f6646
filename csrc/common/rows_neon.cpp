// Row primitives with NEON. On other architectures the level does not exist.
#include "rows.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"
#include "rows_impl.h"

namespace mc {

const RowOps* rows_neon() {
    static const RowOps table = table_named("neon");
    return &table;
}

}  // namespace mc

#else

const mc::RowOps* mc::rows_neon() { return nullptr; }

#endif
