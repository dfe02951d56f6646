// Shapes of the matrix tiles, as LDTILECFG reads them.
#pragma once

#include <cstdint>

namespace mc {
namespace {

struct TileConfig {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t row_bytes[8] = {}, unused_row_bytes[8] = {};
    uint8_t rows[8] = {}, unused_rows[8] = {};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

}  // namespace
}  // namespace mc
