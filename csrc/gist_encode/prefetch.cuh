// Weights, asked for to come to L2 by all blocks of a launch, before they are wanted.
#pragma once

#include "net.cuh"

namespace mc::cuda {

// Eight threads a row: nothing is divided, 64 bits wide, a line.
MC_DEVICE void prefetch_rows(const Matrix& m, int layers, int rows, int64_t bytes) {
    const int thread = static_cast<int>(threadIdx.x), each = static_cast<int>(blockDim.x) / 8;
    for (int layer = 0; layer < layers; ++layer) {
        for (int64_t r = static_cast<int64_t>(blockIdx.x) * each + thread / 8; r < rows;
             r += static_cast<int64_t>(gridDim.x) * each) {
            const char* const row = m.at(layer, r);
            for (int64_t at = thread % 8 * 128; at < bytes; at += 1024) prefetch(row + at);
        }
    }
}

MC_DEVICE void prefetch_weights(const EncodeCall& c, int bytes) {
    prefetch_rows(c.w_in, 1, c.width, static_cast<int64_t>(bytes) * c.embed);
    prefetch_rows(c.qkv, c.layers, 3 * c.width, static_cast<int64_t>(bytes) * c.width);
    prefetch_rows(c.attn_out, c.layers, c.width, static_cast<int64_t>(bytes) * c.width);
    prefetch_rows(c.gate_up, c.layers, 2 * c.ffn, static_cast<int64_t>(bytes) * c.width);
    prefetch_rows(c.down, c.layers, c.width, static_cast<int64_t>(bytes) * c.ffn);
    prefetch_rows(c.w_out, 1, c.embed, static_cast<int64_t>(bytes) * c.width);
}

}  // namespace mc::cuda
