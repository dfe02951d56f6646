// Matrix products in portable C++.
#include "vec_scalar.h"
#include "matmul_impl.h"

namespace mc {

const MatmulOps* matmul_scalar() {
    static const MatmulOps table = {{multiply<FloatStep, 1, 4>, nullptr, nullptr}, nullptr, false};
    return &table;
}

}  // namespace mc
