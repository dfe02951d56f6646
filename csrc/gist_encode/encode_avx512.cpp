// Primitives of gist_encode with AVX-512. Without those flags (another architecture) the level does not exist.
#include "encode.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "encode_impl.h"

namespace mc {

const EncodeOps* encode_avx512() {
    static const EncodeOps table = encode_table("avx512");
    return &table;
}

}  // namespace mc

#else

const mc::EncodeOps* mc::encode_avx512() { return nullptr; }

#endif
