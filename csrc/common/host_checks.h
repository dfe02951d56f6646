// Checks of what goes to a device: sizes that it counts in 32 bits, alignment, workspace.
#pragma once

#include <string>

#include "tensor.h"

namespace mc::cuda {

inline void check_workspace(const void* workspace, int64_t bytes, int64_t needed) {
    if (needed == 0 || (workspace && bytes >= needed && reinterpret_cast<uintptr_t>(workspace) % 16 == 0)) return;
    invalid("workspace: expected " + std::to_string(needed) + " bytes on a multiple of 16, got " +
            (workspace ? std::to_string(bytes) + " bytes" : "NULL"));
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
