// Primitives of lens_score with NEON. On other architectures the level does not exist.
#include "lens.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"
#include "lens_impl.h"

namespace mc {

const LensOps* lens_neon() {
    static const LensOps table = lens_table("neon");
    return &table;
}

}  // namespace mc

#else

const mc::LensOps* mc::lens_neon() { return nullptr; }

#endif
