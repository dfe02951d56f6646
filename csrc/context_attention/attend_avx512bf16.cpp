// Primitives of context_attention with AVX-512 BF16. Without those flags (another architecture) the level does not exist.
#include "attend.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "pairs_impl.h"

namespace mc {

const AttendOps* attend_avx512bf16() {
    static const AttendOps table = [] {
        AttendOps ops = *attend_avx512();
        ops.name = "avx512bf16";
        ops.soften[kBF16] = soften_tile<KeptPairs>;
        ops.query_unit = 1;
        ops.pack_queries = pack_queries;
        ops.attend_pairs = attend_pairs;
        return ops;
    }();
    return &table;
}

}  // namespace mc

#else

const mc::AttendOps* mc::attend_avx512bf16() { return nullptr; }

#endif
