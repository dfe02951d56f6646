// The host's side of words.cuh, for the one source file of an op that launches.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

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

inline void check_workspace(const void* workspace, int64_t bytes, int64_t needed) {
    if (needed == 0 || (workspace && bytes >= needed && reinterpret_cast<uintptr_t>(workspace) % 16 == 0)) return;
    invalid("workspace: expected " + std::to_string(needed) + " bytes on a multiple of 16, got " +
            (workspace ? std::to_string(bytes) + " bytes" : "NULL"));
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

constexpr int64_t kMostInt = 0x7fffffff;

// A size that the device counts in 32 bits.
inline int32_t narrow(const char* what, int64_t x) {
    if (x > kMostInt) {
        invalid(std::string(what) + ": expected at most " + std::to_string(kMostInt) + ", got " + std::to_string(x));
    }
    return static_cast<int32_t>(x);
}

inline bool on_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row of a view begins on 16 bytes. Strides of single-element dimensions are not used.
inline bool rows_on_16(const mc_tensor& x) {
    if (is_empty(x)) return true;
    bool fit = on_16(x.data);
    for (int i = 0; i < x.ndim - 1; ++i) fit = fit && (x.size[i] == 1 || x.stride[i] * dtype_bytes(x.dtype) % 16 == 0);
    return fit;
}

}  // namespace mc::cuda
