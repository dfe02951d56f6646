// context_attention on matrix tiles, for the usual heads of bf16: what is multiplied as in pairs_impl.h, but a product of
// kTileSide keys or queries at a time, for up to as many queries at the price of one.
//
// Included by attend_amx.cpp and attend_emulated.cpp after attend_impl.h and the files that give `Tiles` (tile_amx.h,
// tile_emulated.h) and `Steps` (tile_steps_avx512.h, tile_steps_plain.h). By tiles a key of 128 dimensions takes 8 cycles,
// its value as many, for up to 16 queries. Turning it takes some 50 where 16 were expected, so that 4 queries or fewer are as
// fast in fp32 (bench/README.md).
//
// Scores: turned keys are tiles as they lie, [key, 32 dimensions]; queries are packed once a call (pack_query_tiles). Values:
// two of them interleaved are a row of a tile, with the dimensions of 128-bit lanes in `low` and `high` tiles; what the
// softmax gives is the other operand. All tiles are full: queries that do not exist cost nothing that matters, and tiles
// are configured once for a run of entries.
#pragma once

#include <cstring>

#include "attend.h"
#include "tile_config.h"

namespace mc {
namespace {

constexpr int kTileSide = 16, kTileElements = 32, kTileBytes = 1024;
constexpr int kKeysAtOnce = 2 * kTileSide;
constexpr int kValueDims = 64;  // of values at a time: four tiles of sums
// Tiles: the sums, and the two operands.
enum { kSum0, kSum1, kSum2, kSum3, kLeft, kRight, kLeftToo, kRightToo };

void begin_tiles() {
    TileConfig c;
    for (int i = 0; i < 8; ++i) {
        c.rows[i] = kTileSide;
        c.row_bytes[i] = 64;
    }
    Tiles{}.configure(c);
}

void end_tiles() { Tiles::release(); }

// Rows [rows, dims] of fp32 to tiles [query group][32 dimensions][pair][query] of bf16, zeros for queries beyond the last.
void pack_query_tiles(const float* q, int64_t rows, int64_t step, int64_t dims, uint16_t* out) {
    const int64_t groups = (rows + kTileSide - 1) / kTileSide, chunks = dims / kTileElements;
    std::memset(out, 0, static_cast<size_t>(groups * chunks * kTileBytes));
    for (int64_t j = 0; j < rows; ++j, q += step) {
        for (int64_t c = 0; c < chunks; ++c) {
            uint32_t pairs[kTileSide];
            Steps::narrow_query(q + c * kTileElements, reinterpret_cast<uint16_t*>(pairs));
            uint16_t* tile = out + (j / kTileSide * chunks + c) * kTileBytes / 2 + j % kTileSide * 2;
            for (int r = 0; r < kTileSide; ++r) std::memcpy(tile + r * 2 * kTileSide, pairs + r, sizeof *pairs);
        }
    }
}

// Keys [e, e + kKeysAtOnce) turned into `out` [kKeysAtOnce, kDims], zeros beyond the last.
template <int kDims>
inline void turn_tile_keys(const HeadBlock& a, int64_t e, uint16_t* out) {
    const int64_t left = a.entries->count - e, n = left < kKeysAtOnce ? left : kKeysAtOnce;
    for (int64_t i = 0; i < n; ++i, out += kDims) {
        const int64_t slot = a.entries->slot[e + i];
        if (a.next) fetch_row<kDims * BF16::kBytes>(a.next + slot * a.k_step);
        Steps::turn_key<kDims>(a.k + slot * a.k_step, a.phase + (e + i) * kDims, out);
    }
    std::memset(out, 0, static_cast<size_t>((kKeysAtOnce - n) * kDims * BF16::kBytes));
}

// scores [kKeysAtOnce, kTileSide]: products of turned keys with a group of queries.
template <int kDims>
inline void score_tile(const uint16_t* turned, const uint16_t* q, float* scores) {
    constexpr int64_t kRow = kDims * BF16::kBytes, kNext = kTileSide * kRow, kOut = kTileSide * sizeof(float);
    Tiles t;
    t.template zero<kSum0>();
    t.template zero<kSum1>();
    const char* keys = reinterpret_cast<const char*>(turned);
    for (int d = 0; d < kDims; d += kTileElements, keys += 64, q += kTileBytes / 2) {
        t.template load<kRight>(q, 64);
        t.template load<kLeft>(keys, kRow);
        t.template multiply<kSum0, kLeft, kRight>();
        t.template load<kLeftToo>(keys + kNext, kRow);
        t.template multiply<kSum1, kLeftToo, kRight>();
    }
    t.template store<kSum0>(scores, kOut);
    t.template store<kSum1>(scores + kTileSide * kTileSide, kOut);
}

// Values' dimensions [d, d + kValueDims) of entries [e, e + 32) as tiles [32 dimensions][low, high], zeros beyond the last.
inline void pair_values(const HeadBlock& a, int64_t e, int d, uint16_t* tiles) {
    const int64_t count = a.entries->count, bytes = d * BF16::kBytes;
    alignas(64) static const char kNone[kValueDims * BF16::kBytes] = {};
    const auto row_of = [&](int64_t i) {
        if (i >= count) return kNone + 0;
        const int64_t at = a.entries->slot[i] * a.v_step + bytes;
        if (a.next_v) fetch_row<kValueDims * BF16::kBytes>(a.next_v + at);
        return a.v + at;
    };
    for (int r = 0; r < kTileSide; ++r, tiles += kTileElements) {
        const char *first = row_of(e + 2 * r), *second = row_of(e + 2 * r + 1);
        Steps::interleave(first, second, tiles, tiles + kTileBytes / 2);
        Steps::interleave(first + 64, second + 64, tiles + kTileBytes, tiles + kTileBytes * 3 / 2);
    }
}

// The sums of a group of queries in the tiles of sums: those of 32 entries more.
inline void gather_tiles(const uint16_t* weights, const uint16_t* values) {
    constexpr int64_t kTile = kTileBytes / 2;
    Tiles t;
    t.template load<kLeft>(weights, kBlock * sizeof *weights);
    t.template load<kRight>(values, 64);
    t.template multiply<kSum0, kLeft, kRight>();
    t.template load<kRightToo>(values + kTile, 64);
    t.template multiply<kSum1, kLeft, kRightToo>();
    t.template load<kRight>(values + 2 * kTile, 64);
    t.template multiply<kSum2, kLeft, kRight>();
    t.template load<kRightToo>(values + 3 * kTile, 64);
    t.template multiply<kSum3, kLeft, kRightToo>();
}

inline void begin_sums() {
    Tiles t;
    t.template zero<kSum0>();
    t.template zero<kSum1>();
    t.template zero<kSum2>();
    t.template zero<kSum3>();
}

// To out [rows, kValueDims].
inline void add_tiles(int rows, int64_t out_step, float* out) {
    constexpr int64_t kOut = kTileSide * sizeof(float), kTile = kTileSide * kTileSide;
    alignas(64) float sums[4 * kTile];
    Tiles t;
    t.template store<kSum0>(sums, kOut);
    t.template store<kSum1>(sums + kTile, kOut);
    t.template store<kSum2>(sums + 2 * kTile, kOut);
    t.template store<kSum3>(sums + 3 * kTile, kOut);
    for (int r = 0; r < rows; ++r, out += out_step) {
        const float* from = sums + r * kTileSide;
        Steps::add_sums(from, from + kTile, out);
        Steps::add_sums(from + 2 * kTile, from + 3 * kTile, out + kTileElements);
    }
}

template <int kDims>
inline void attend_tile_dims(const HeadBlock& a) {
    const int64_t count = a.entries->count, groups = (a.rows + kTileSide - 1) / kTileSide;
    const auto rows_of = [&](int64_t g) {
        return static_cast<int>(g + 1 < groups ? kTileSide : a.rows - g * kTileSide);
    };
    // What vectors write, tiles read a step later: until then it is in the first-level cache.
    alignas(64) uint16_t turned[2][kKeysAtOnce * kDims];
    alignas(64) float products[2 * kTileSide * kTileSide];
    const auto score = [&](int64_t e) {
        for (int64_t g = 0; g < groups; ++g) {
            score_tile<kDims>(turned[e / kKeysAtOnce % 2], a.q_pairs + g * kTileSide * kDims, products);
            Steps::scores_to_rows(products, rows_of(g), a.p + g * kTileSide * kBlock + e);
        }
    };
    int64_t e = 0;
    for (; e < count; e += kKeysAtOnce) {
        turn_tile_keys<kDims>(a, e, turned[e / kKeysAtOnce % 2]);
        if (e > 0) score(e - kKeysAtOnce);
    }
    score(e - kKeysAtOnce);
    const int64_t n = (count + kPad - 1) / kPad * kPad;
    for (int64_t j = 0; j < a.rows; ++j) {
        soften(a, j, n, kDims);
        Steps::narrow_weights(a.p + j * kBlock, n, a.p_pairs + j * kBlock);
    }
    // Of one group only what is read next is kept, so that it stays near.
    alignas(64) uint16_t values[kBlock / kTileElements][4 * kTileBytes / 2];
    const auto tiles_of = [&](int64_t at) { return values[at / kTileElements % (groups > 1 ? kBlock : 2)]; };
    for (int d = 0; d < kDims; d += kValueDims) {
        for (int64_t g = 0; g < groups; ++g) {
            const uint16_t* weights = a.p_pairs + g * kTileSide * kBlock;
            begin_sums();
            for (e = 0; e < count; e += kTileElements) {
                if (g == 0) pair_values(a, e, d, tiles_of(e));
                if (e > 0) gather_tiles(weights + e - kTileElements, tiles_of(e - kTileElements));
            }
            gather_tiles(weights + e - kTileElements, tiles_of(e - kTileElements));
            add_tiles(rows_of(g), a.out_step, a.out + g * kTileSide * a.out_step + d);
        }
    }
}

void attend_tiles(const HeadBlock& a) { a.shape->dims == 64 ? attend_tile_dims<64>(a) : attend_tile_dims<128>(a); }

// The table of a level that has everything else from `rest`.
inline AttendOps with_tiles(const AttendOps& rest, const char* name) {
    AttendOps ops = rest;
    ops.name = name;
    ops.least_rows = kFewRows + 1;
    ops.query_unit = kTileSide;
    ops.begin_pairs = begin_tiles;
    ops.end_pairs = end_tiles;
    ops.pack_queries = pack_query_tiles;
    ops.attend_pairs = attend_tiles;
    return ops;
}

}  // namespace
}  // namespace mc
