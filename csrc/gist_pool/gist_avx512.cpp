// Primitives of gist_pool with AVX-512. Without those flags (another architecture) the level does not exist.
#include "gist.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "gist_impl.h"

namespace mc {

const GistOps* gist_avx512() {
    static const GistOps table = gist_table("avx512");
    return &table;
}

}  // namespace mc

#else

const mc::GistOps* mc::gist_avx512() { return nullptr; }

#endif
