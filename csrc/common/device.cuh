// What kernels are written with. Under nvcc this is CUDA; under a C++ compiler the same words are those of
// emulate/emulate.h, which runs a grid on the CPU and checks each access: for tests. Kernels without inline PTX build
// both ways, if global memory is read and written by `read` and `write` alone.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MC_DEVICE __device__ __forceinline__
// A deliberate error that a test switches on in the emulated build, to see that it is noticed.
#define MC_FAULT(number) false

namespace mc::cuda {

// Memory that the kernel may also write.
template <class T>
MC_DEVICE T read(const void* p) {
    return *static_cast<const T*>(p);
}

// Memory that nobody writes while the kernel runs.
template <class T>
MC_DEVICE T read_constant(const void* p);

template <class T>
MC_DEVICE void write(void* p, T x) {
    *static_cast<T*>(p) = x;
}

}  // namespace mc::cuda

#else

#include "emulate/emulate.h"

#endif

namespace mc::cuda {

// V elements that are moved as one.
template <class Bits, int V>
struct alignas(sizeof(Bits) * V) Pack {
    Bits x[V];
};

}  // namespace mc::cuda

#if defined(__CUDACC__)

namespace mc::cuda {

template <class T>
MC_DEVICE T read_constant(const void* p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load");
    T out;
    if constexpr (sizeof(T) == 16) {
        const uint4 bits = __ldg(static_cast<const uint4*>(p));
        memcpy(&out, &bits, 16);
    } else if constexpr (sizeof(T) == 8) {
        const uint2 bits = __ldg(static_cast<const uint2*>(p));
        memcpy(&out, &bits, 8);
    } else if constexpr (sizeof(T) == 4) {
        const unsigned bits = __ldg(static_cast<const unsigned*>(p));
        memcpy(&out, &bits, 4);
    } else {
        const unsigned short bits = __ldg(static_cast<const unsigned short*>(p));
        memcpy(&out, &bits, 2);
    }
    return out;
}

}  // namespace mc::cuda

#endif
