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
// One copy for all kernels of a source file: what is long, and called from many places.
#define MC_CALLED static __device__ __noinline__
#define MC_BOTH __host__ __device__ __forceinline__  // for the host's side too
#define MC_SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]
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

// Asks for a line to come to L2.
MC_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <class T>
MC_DEVICE void write(void* p, T x) {
    *static_cast<T*>(p) = x;
}

}  // namespace mc::cuda

#else

#include "emulate/emulate.h"

#endif

namespace mc::cuda {

// Shared memory of the block, dealt out from its start. In the emulation every index is checked.
template <class T>
struct Span {
    T* data;
    int64_t size;

    MC_DEVICE T& operator[](int64_t i) const {
#if !defined(__CUDACC__)
        if (i < 0 || i >= size) {
            emulate::fail("index " + std::to_string(i) + " of " + std::to_string(size) + " in shared memory");
        }
#endif
        return data[i];
    }
    MC_DEVICE Span part(int64_t from, int64_t n) const { return {data + from, n}; }
};

class SharedMemory {
public:
    // base: MC_SHARED_MEMORY.
    MC_DEVICE explicit SharedMemory(char* base) : base_(base) {}

    // On 16 bytes, as `bytes_of` counts.
    template <class T>
    MC_DEVICE Span<T> take(int64_t n) {
        T* at = reinterpret_cast<T*>(base_ + used_);
        used_ += (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
#if !defined(__CUDACC__)
        emulate::shared_memory(used_);
#endif
        return {at, n};
    }

private:
    char* base_;
    int64_t used_ = 0;
};

// Of `n` elements that are taken from shared memory.
template <class T>
constexpr int64_t shared_bytes_of(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

// x, which the compiler does not know: what is made of it is made where it is wanted, not kept in registers since before.
MC_DEVICE int fresh(int x) {
#if defined(__CUDACC__)
    asm volatile("" : "+r"(x));
#endif
    return x;
}

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
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load");
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
    } else if constexpr (sizeof(T) == 2) {
        const unsigned short bits = __ldg(static_cast<const unsigned short*>(p));
        memcpy(&out, &bits, 2);
    } else {
        const unsigned char bits = __ldg(static_cast<const unsigned char*>(p));
        memcpy(&out, &bits, 1);
    }
    return out;
}

}  // namespace mc::cuda

#endif
