// The tile micro-kernel on emulated tiles, for tests on any machine; products of F32 are the portable ones.
#include "tile_emulated.h"
#include "matmul_tiles.h"

namespace mc {

const MatmulOps* matmul_emulated() {
    static const MatmulOps table = {{matmul_scalar()->multiply[kF32], nullptr, multiply_tiles}, release_tiles, true};
    return &table;
}

}  // namespace mc
