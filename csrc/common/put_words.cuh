// The host's side of words.cuh, for the one source file of an op that launches.
#pragma once

#include <algorithm>
#include <vector>

#include "host_checks.h"
#include "launch.cuh"
#include "words.cuh"

namespace mc::cuda {

static __global__ void put_words(const __grid_constant__ PutWords p) {
    for (int i = static_cast<int>(threadIdx.x); i < p.count; i += static_cast<int>(blockDim.x)) {
        write(p.to + i, p.words[i]);
    }
}

inline int64_t words_workspace(size_t n) {
    return n <= kInlineWords ? 0 : (static_cast<int64_t>(n) * 4 + 15) / 16 * 16;
}

// The words, inline or into the workspace by as many launches as it takes: their arguments are copied when they are
// launched, so nothing of the caller's is read later, and no copy waits for pageable memory.
inline void give_words(Words& to, const std::vector<int32_t>& words, void* workspace, void* stream) {
    to.far = nullptr;
    if (words.size() <= kInlineWords) {
        std::copy(words.begin(), words.end(), to.near);
        return;
    }
    to.far = static_cast<const int32_t*>(workspace);
    for (size_t i = 0; i < words.size(); i += kInlineWords) {
        PutWords p;
        p.to = static_cast<int32_t*>(workspace) + i;
        p.count = static_cast<int32_t>(std::min<size_t>(kInlineWords, words.size() - i));
        std::copy_n(words.begin() + static_cast<std::ptrdiff_t>(i), p.count, p.words);
        launch("plan", put_words, 1, block_threads(256), 0, stream, p);
    }
}

}  // namespace mc::cuda
