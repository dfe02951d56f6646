// Primitives of context_attention with matrix tiles. Without those flags the level does not exist.
#include "attend.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "vec_avx512.h"
#include "tile_amx.h"
#include "tile_steps_avx512.h"
#include "head_tiles_impl.h"

namespace mc {

const AttendOps* attend_amx() {
    static const AttendOps table = with_tiles(*attend_avx512bf16(), "amx");
    return &table;
}

}  // namespace mc

#else

const mc::AttendOps* mc::attend_amx() { return nullptr; }

#endif
