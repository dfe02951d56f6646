// Primitives of context_attention in portable C++.
#include "vec_scalar.h"
#include "attend_impl.h"

namespace mc {

const AttendOps* attend_scalar() {
    static const AttendOps table = attend_table("scalar");
    return &table;
}

}  // namespace mc
