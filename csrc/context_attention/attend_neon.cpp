// Primitives of context_attention with NEON. On other architectures the level does not exist.
#include "attend.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "vec_neon.h"
#include "attend_impl.h"

namespace mc {

const AttendOps* attend_neon() {
    static const AttendOps table = attend_table("neon");
    return &table;
}

}  // namespace mc

#else

const mc::AttendOps* mc::attend_neon() { return nullptr; }

#endif
