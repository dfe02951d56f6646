// Primitives of gist_encode with AVX2, FMA and F16C. Without those flags (another architecture) the level does not exist.
#include "encode.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "encode_impl.h"

namespace mc {

const EncodeOps* encode_avx2() {
    static const EncodeOps table = encode_table("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::EncodeOps* mc::encode_avx2() { return nullptr; }

#endif
