// Primitives of fused_linear with AVX-512 BF16. Without those flags (another architecture) the level does not exist.
#include "linear.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include "vec_avx512.h"
#include "pairs_impl.h"
#include "bytes_avx512.h"
#include "packed_impl.h"

namespace mc {

const LinearOps* linear_avx512bf16() {
    static const LinearOps table = [] {
        LinearOps ops = with_packed(*linear_avx512(), "avx512bf16");
        ops.narrow = narrow;
        ops.dot_pairs = dot_pairs;
        return ops;
    }();
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_avx512bf16() { return nullptr; }

#endif
