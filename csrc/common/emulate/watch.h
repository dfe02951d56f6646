// What a launch may touch, and who has touched it: bounds and races of emulated kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mc_kernels.h"

namespace mc::emulate {

// The views that a launch may touch, for as long as the object lives. They are taken from the caller's arguments, not
// from the kernel's arithmetic. An access must lie within elements of one of them; gaps between rows are outside.
class Watched {
public:
    Watched();
    ~Watched();
    Watched(const Watched&) = delete;
    Watched& operator=(const Watched&) = delete;

    void view(const char* name, const mc_tensor& x, bool written);
    void array(const char* name, const void* data, int64_t bytes, bool written);
    // Written, and exchanged between threads by atomics and fences, which are not followed: bounds alone are checked.
    void shared_array(const char* name, const void* data, int64_t bytes);
};

// Both end the launch with a text where something is wrong.
void check_access(const void* p, size_t bytes, size_t alignment, bool writes);
void check_atomic(const void* p, size_t bytes);

// A launch begins: nothing has been touched.
void forget_accesses();

}  // namespace mc::emulate
