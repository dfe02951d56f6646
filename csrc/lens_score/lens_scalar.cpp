// Primitives of lens_score in portable C++.
#include "vec_scalar.h"
#include "lens_impl.h"

namespace mc {

const LensOps* lens_scalar() {
    static const LensOps table = lens_table("scalar");
    return &table;
}

}  // namespace mc
