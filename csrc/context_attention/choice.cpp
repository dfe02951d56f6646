// What attends: the primitives of a level, and which of two ways, one stream over the keys (cpu.cpp) or tiles of queries
// (tiles.cpp). Both can do anything.
#include <atomic>

#include "tiles.h"

namespace mc {
namespace {

// Queries times heads of a group up to which one stream is no slower, by measurement (bench/README.md, "Prefill attention").
constexpr int64_t kMostBF16Rows = 80, kMostRows = 191;
// The stream keeps every probability until mass is summed.
constexpr int64_t kMostProbabilities = 1 << 24;

std::atomic<int64_t> most_rows_of_a_test{-1};

}  // namespace

const AttendOps& attend_ops(const IsaLevel& level) {
    return ops_of(level, "context_attention", {attend_amx(), attend_avx512bf16(), attend_avx512(), attend_avx2(),
                                               attend_neon(), attend_emulated(), attend_scalar()});
}

int product_type(const Attention& x, const IsaLevel& level) {
    return x.dtype == kBF16 && level.matmul->multiply[kBF16] ? kBF16 : kF32;
}

bool serves_tiles(const Attention& x, bool with_mass) {
    const int64_t asked = most_rows_of_a_test.load(std::memory_order_relaxed);
    const int64_t measured = product_type(x, isa_level()) == kBF16 ? kMostBF16Rows : kMostRows;
    if (with_mass && x.batch * x.heads * x.queries > kMostProbabilities / x.slots) return true;
    return x.rows > (asked < 0 ? measured : asked);
}

}  // namespace mc

// More rows than these go to tiles, below 0: as measured. For tests: in the library, not in its header.
extern "C" MC_API void mc_probe_attention_tiles(int64_t most_rows) {
    mc::most_rows_of_a_test.store(most_rows, std::memory_order_relaxed);
}
