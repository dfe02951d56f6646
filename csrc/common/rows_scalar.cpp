// Row primitives in portable C++: a vector is an array, and the compiler may use whatever every such processor has.
#include "vec_scalar.h"
#include "rows_impl.h"

namespace mc {

const RowOps* rows_scalar() {
    static const RowOps table = table_named("scalar");
    return &table;
}

}  // namespace mc
