// Primitives of gist_pool with NEON. On other architectures the level does not exist.
#include "gist.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"
#include "gist_impl.h"

namespace mc {

const GistOps* gist_neon() {
    static const GistOps table = gist_table("neon");
    return &table;
}

}  // namespace mc

#else

const mc::GistOps* mc::gist_neon() { return nullptr; }

#endif
