// Primitives of gist_pool in portable C++.
#include "vec_scalar.h"
#include "gist_impl.h"

namespace mc {

const GistOps* gist_scalar() {
    static const GistOps table = gist_table("scalar");
    return &table;
}

}  // namespace mc
