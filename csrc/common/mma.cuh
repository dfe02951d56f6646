// Matrix products of one warp, 16 x 16 x 16, operands in shared memory and sums in fp32: on tensor cores for 16-bit
// operands, by fused multiply-adds for fp32, which tensor cores would round.
#pragma once

#include "device_types.cuh"

#if defined(__CUDACC__)
#include <mma.h>
#endif

namespace mc::cuda {

// A lane has half a row: elements [row][first .. first + 7].
template <class E>
struct WarpSums {
    using Bits = typename E::Bits;
    float x[8] = {};

    static MC_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }

    // sums += a b with a [16, 16] row after row, b [16, 16] likewise or (kTurned) column after column.
    template <bool kTurned>
    MC_DEVICE void add(const Bits* a, int a_step, const Bits* b, int b_step) {
        const int row = lane() / 2, first = lane() % 2 * 8;
#pragma unroll 4  // for the compiler's time
        for (int k = 0; k < 16; ++k) {
            const float left = E::widen(a[row * a_step + k]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x[i] += left * E::widen(kTurned ? b[(first + i) * b_step + k] : b[k * b_step + first + i]);
            }
        }
    }

    MC_DEVICE void store(float* to, int step) const {
        const int row = lane() / 2, first = lane() % 2 * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) to[row * step + first + i] = x[i];
    }
};

#if defined(__CUDACC__)

template <class E, class T>
struct TensorSums {
    using Bits = typename E::Bits;
    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> x;

    MC_DEVICE TensorSums() { nvcuda::wmma::fill_fragment(x, 0.0f); }

    template <bool kTurned>
    MC_DEVICE void add(const Bits* a, int a_step, const Bits* b, int b_step) {
        using namespace nvcuda::wmma;
        fragment<matrix_a, 16, 16, 16, T, row_major> left;
        fragment<matrix_b, 16, 16, 16, T, std::conditional_t<kTurned, col_major, row_major>> right;
        load_matrix_sync(left, reinterpret_cast<const T*>(a), static_cast<unsigned>(a_step));
        load_matrix_sync(right, reinterpret_cast<const T*>(b), static_cast<unsigned>(b_step));
        mma_sync(x, left, right, x);
    }

    MC_DEVICE void store(float* to, int step) const {
        nvcuda::wmma::store_matrix_sync(to, x, static_cast<unsigned>(step), nvcuda::wmma::mem_row_major);
    }
};

template <>
struct WarpSums<Half> : TensorSums<Half, __half> {};
template <>
struct WarpSums<Bfloat> : TensorSums<Bfloat, __nv_bfloat16> {};

#endif

}  // namespace mc::cuda
