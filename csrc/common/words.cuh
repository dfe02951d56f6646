// 32-bit integers that the host has made for a kernel, as a plan: with the launch, or in a workspace where they are many.
#pragma once

#include "device.cuh"

namespace mc::cuda {

// So many go with the launch.
constexpr int kInlineWords = 896;

struct Words {
    const int32_t* far;  // nullptr: the inline ones
    int32_t near[kInlineWords];

    MC_DEVICE int operator[](int i) const {
#if !defined(__CUDACC__)
        if (!far && (i < 0 || i >= kInlineWords)) emulate::fail("word " + std::to_string(i) + " of the plan");
#endif
        return far ? read_constant<int32_t>(far + i) : near[i];
    }
};

// Takes words to a workspace, a launch's worth at a time.
struct PutWords {
    int32_t* to;
    int32_t count;
    int32_t words[kInlineWords];
};

}  // namespace mc::cuda
