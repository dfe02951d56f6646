// Matrix products with AMX's tiles of BF16; those of F32 are AVX-512's. Without those flags the level does not exist.
#include "matmul.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

#include "tile_amx.h"
#include "matmul_tiles.h"

namespace mc {

const MatmulOps* matmul_amx() {
    static const MatmulOps table = {{matmul_avx512()->multiply[kF32], nullptr, multiply_tiles}, release_tiles, true};
    return &table;
}

}  // namespace mc

#else

const mc::MatmulOps* mc::matmul_amx() { return nullptr; }

#endif
