// Primitives of gist_pool with AVX-512 BF16. Without those flags (another architecture) the level does not exist.
#include "gist.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "pairs_impl.h"

namespace mc {

const GistOps* gist_avx512bf16() {
    static const GistOps table = [] {
        GistOps ops = *gist_avx512();
        ops.name = "avx512bf16";
        ops.pool_pairs = pool_pairs;
        ops.residual_pairs = residual_pairs;
        return ops;
    }();
    return &table;
}

}  // namespace mc

#else

const mc::GistOps* mc::gist_avx512bf16() { return nullptr; }

#endif
