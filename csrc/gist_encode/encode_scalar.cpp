// Primitives of gist_encode in portable C++.
#include "vec_scalar.h"
#include "encode_impl.h"

namespace mc {

const EncodeOps* encode_scalar() {
    static const EncodeOps table = encode_table("scalar");
    return &table;
}

}  // namespace mc
