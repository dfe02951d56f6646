// Primitives of context_attention on emulated tiles, for tests on any machine.
#include "vec_scalar.h"
#include "attend_impl.h"
#include "tile_emulated.h"
#include "tile_steps_plain.h"
#include "head_tiles_impl.h"

namespace mc {

const AttendOps* attend_emulated() {
    static const AttendOps table = with_tiles(*attend_scalar(), "amx-emulated");
    return &table;
}

}  // namespace mc
