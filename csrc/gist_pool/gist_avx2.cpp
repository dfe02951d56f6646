// Primitives of gist_pool with AVX2, FMA and F16C. Without those flags (another architecture) the level does not exist.
#include "gist.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "gist_impl.h"

namespace mc {

const GistOps* gist_avx2() {
    static const GistOps table = gist_table("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::GistOps* mc::gist_avx2() { return nullptr; }

#endif
