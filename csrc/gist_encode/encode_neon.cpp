// Primitives of gist_encode with NEON. On other architectures the level does not exist.
#include "encode.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"
#include "encode_impl.h"

namespace mc {

const EncodeOps* encode_neon() {
    static const EncodeOps table = encode_table("neon");
    return &table;
}

}  // namespace mc

#else

const mc::EncodeOps* mc::encode_neon() { return nullptr; }

#endif
