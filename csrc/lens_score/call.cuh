// What the lens_score kernel is told, and where its blocks exchange what.
#pragma once

#include "values.cuh"

namespace mc::cuda {

constexpr int kLensThreads = 256, kLensWarps = kLensThreads / kWarp;
constexpr int kMost = 16;                         // queries, and direct rows
constexpr int kTile = 64, kTileRows = 2 * kTile;  // entries (or columns) of a tile; vectors that meet them
constexpr int kTileStep = kTile + 8;              // elements from row to row of a tile in shared memory
constexpr int kColumns = 256, kChunk = 512;          // of E: of an absorbed vector, of an attended value, a block's
constexpr float kLensEps = 1e-12f;                // mc_kernels/lens_score/ref.py

// Rows of the caller's memory, steps in bytes.
struct LensRows {
    const char* data;
    int64_t pass, row;

    MC_BOTH const char* of(int read_pass) const { return data + read_pass * pass; }
};

struct LensCall {
    LensRows entries, features, queries, w_in, read_norm, read_q, read_k, read_v, read_out, mlp_norm, mlp_gate_up,
        mlp_down, score_norm, score_q, score_k, score_v, direct, head_in, head_bias, head_out, head_out_bias;
    const uint8_t* legal;
    char* out;
    int64_t out_row, out_column;
    int32_t entry_dtype, weight_dtype, operand;
    int32_t n, e, q, d, heads, passes, f, head_values, n_direct, n_features, hidden, inputs;
    int32_t tiles, splits;  // of N: tiles of kTile entries; parts into which a weighted sum is cut, by whole tiles
    int32_t parts_n, chunk; // of E: parts of an attended value, and their columns
    int32_t e_step;         // elements from row to row of `vectors` and `sums`
    int32_t keep;           // of eight pieces of the entries: for L2 to keep from stream to stream; 0: as it likes
    bool aligned;           // entries are of the operands' type and can be copied 16 bytes at a time

    // Workspace. vectors, p: operands; the others fp32.
    char *vectors, *p;  // [kTileRows, e_step], [vectors, tiles * kTile]
    float *z, *tops, *totals, *sums, *parts, *act, *values, *squares, *inverse,
        *tile_tops;
    // [16, d], [vectors, tiles] twice, [splits, vectors, e_step], [parts_n, 16, d], [16, f], [16, heads * head_values];
    // d and f padded to 4; of fast_kernel.cuh alone [parts_n, 8], [tiles * kTile] twice

    MC_BOTH int vectors_n() const { return heads * q; }
    MC_BOTH int head_dim() const { return d / heads; }
};

}  // namespace mc::cuda
