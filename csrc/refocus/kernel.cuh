// Refocus on a GPU: from scores to an edited cache, with nothing copied back. The contract: mc_kernels.h. Two launches:
// refocus_plan decides and lays out, one block of threads; refocus_apply (apply.cuh) edits the cache, one block a lane.
// What passes between them lies in device memory, counts included, so the grids depend on nothing but capacities and both
// launches may be captured in a graph.
//
// Floor. The plan touches some 100 bytes an entry (8,192 entries: 0.8 MB, 0.2 us at 4.8 TB/s) and is bound by latency: one
// block passes over the entries five times, in rounds of 1,024 that wait for one another, and over the candidates once
// for each bit of a weight that it takes to tell the heaviest apart. Applying: a closed group is K entries read and a
// share of M, an opened gist K entries read and written (8 and 4 of them for Llama-3-8B in bf16: 17 + 34 MB and 34 MB,
// 18 us at 4.8 TB/s), and a moved entry as much as an inserted one.
// Estimate for 8,192 entries on a H200, not measured: 8 rounds a pass at 1 to 2 us, 60 us, 20 to 60 counts at 0.2 us,
// 10 us, 25 us to apply, two launches; with 25 us of lens_score before them some 125 us.
//
// Plan. Passes are separated by barriers of the block, and a pass writes what no other thread reads before the next:
//   1. find_openings   gists that ask to open, and the rows of their children in the store
//   2. list_candidates these, and complete groups of siblings that may close, with the keys of their weights
//   3. choose, mark    the heaviest that fit
//   4. free_slots, find_holes: slots that change hands
//   5. lay_out         the new layout aside, the lists of edits; put_back: it takes the old one's place
#pragma once

#include "apply.cuh"
#include "plan.cuh"

namespace mc::cuda {

constexpr int kPlanThreads = 1024;

__global__ void __launch_bounds__(kPlanThreads, 1) refocus_plan(const __grid_constant__ RefocusCall c) {
    MC_SHARED_MEMORY(bytes);
    SharedMemory shared(bytes);
    Rounds rounds{shared.take<uint32_t>(2 * kMostWarps)};
    const int64_t length = read<int64_t>(c.state + kLength), cycle = read<int64_t>(c.state + kCycle) + 1;
    const int n = static_cast<int>(between(0, length, c.capacity));
    ask_for_all(c, n);
    int moved = 0;
    int wanted = 0;
    find_openings(c, rounds, n, cycle, wanted);
    const Three candidates = list_candidates(c, rounds, n, cycle);
    __syncthreads();
    const Choice choice = choose(c, rounds, n, candidates);
    mark(c, choice, candidates.a);
    __syncthreads();
    const Counts counts(c, n, choice);
    const bool edits = choice.opened + choice.closed > 0;
    if (edits) {
        free_slots(c, n);
        __syncthreads();
        moved = find_holes(c, rounds, counts);
        __syncthreads();
        lay_out(c, rounds, counts, static_cast<int>(cycle));
        if (!MC_FAULT(2)) __syncthreads();
        put_back(c, counts);
    }
    if (threadIdx.x != 0) return;
    write(c.state + kLength, static_cast<int64_t>(counts.after));
    write(c.state + kCycle, cycle);
    write(c.state + kOpened, static_cast<int64_t>(choice.opened));
    write(c.state + kClosed, static_cast<int64_t>(choice.closed));
    write(c.state + kOver, between(0, counts.after - c.budget, counts.after));
    write(c.state + kInserted, static_cast<int64_t>(counts.inserted));
    write(c.state + kWanted, static_cast<int64_t>(wanted));
    write(c.state + kMoved, static_cast<int64_t>(moved));
}

}  // namespace mc::cuda
