// Matrix tiles: AMX's own. See tile_emulated.h for the same in C++.
//
// In assembly: GCC's intrinsics name a tile by a literal and take no template argument.
#pragma once

#include <cstdint>

#include "tile_config.h"

namespace mc {
namespace {

// What tiles this thread had configured for itself before us: some libraries (llama.cpp's) configure a thread's once.
struct KeptTiles {
    TileConfig config;
    bool there;
};
thread_local KeptTiles kept_tiles{{0, 0, {}, {}, {}, {}, {}}, false};

struct Tiles {
    void configure(const TileConfig& c) {
        if (!kept_tiles.there) __asm__ volatile("sttilecfg %0" : "=m"(kept_tiles.config));
        kept_tiles.there = true;
        __asm__ volatile("ldtilecfg %0" ::"m"(c));
    }
    // Back to what was there; of none, which is palette 0, that releases all tiles.
    static void release() {
        if (kept_tiles.there) __asm__ volatile("ldtilecfg %0" ::"m"(kept_tiles.config));
        kept_tiles.there = false;
    }

    template <int kTile>
    void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
    }
    template <int kTile>
    void load(const void* p, int64_t step) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(step), "i"(kTile) : "memory");
    }
    template <int kTile>
    void store(void* p, int64_t step) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(step), "i"(kTile) : "memory");
    }
    // kSum += kA kB
    template <int kSum, int kA, int kB>
    void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
    }
};

}  // namespace
}  // namespace mc
