// What the refocus kernels are told: one struct, passed by value. Addresses are of device memory.
#pragma once

#include "device.cuh"

namespace mc::cuda {

// Places of the state, see mc_refocus_args.
enum State : int { kLength, kCycle, kOpened, kClosed, kOver, kMoved, kInserted, kWanted, kStateWords };

struct RefocusCall {
    // The Working Context, by rank, and what goes by slot. Written.
    int32_t *levels, *born;
    int64_t *index, *slots, *pos, *state;
    float* bias;  // nullptr: all entries weigh alike

    const int64_t *counts, *pinned, *store_keys;
    const int32_t* store_rows;
    const float* scores;

    // Results.
    int32_t *edits, *inserted, *moves, *children, *pooled_levels;
    int64_t* wanted;

    // Scratch, of `capacity` each; see the phases in allocate.cuh and plan.cuh.
    uint64_t* keys;
    int32_t *ranks, *rows, *actions, *freed, *holes, *new_levels, *new_born, *new_slots;
    int64_t* new_index;

    double min_gain, spare, gist_bias;  // spare: hysteresis - min_gain
    int64_t budget, cooldown, max_edits;
    int32_t capacity, block, n_levels, n_pinned, n_store, n_wanted;
};

}  // namespace mc::cuda
