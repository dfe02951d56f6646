// Matrix products of a warp on tensor cores, m16n8k16 with sums in fp32: the instruction, and the two ways its operands
// come to it.
//
// The instruction wants of lane 4 g + c, of A [16, 16]: rows g and g + 8, columns 2c, 2c + 1, 2c + 8, 2c + 9; of B
// [16, 8]: the same rows of column g. It gives rows g, g, g + 8, g + 8, columns 2c, 2c + 1, 2c, 2c + 1 of C [16, 8].
//
// Straight from memory in 16-byte loads: a product does not see the order of its inner dimension, so the lane may hold
// any four columns there as long as A and B agree: here 8 neighbours, which are two products' worth. Of 32 columns of a
// row, lane c of four has its eighth piece, a `Quad`; `multiply` takes two rows of A and one of B^T.
// From shared memory: `load_matrices` brings four 8 x 8 matrices, which `left_row` and the like place so that they are one
// A, or two Bs. Rows begin on 16 bytes; steps between them of an odd number of 16 bytes keep the banks apart.
//
// Under a C++ compiler the lanes exchange their operands and multiply them one by one: what a test sees of the layout is
// this file's word for it.
#pragma once

#include "device_types.cuh"

namespace mc::cuda {

// 8 elements of 16 bits.
using Quad = Pack<uint32_t, 4>;

// Two numbers as a pair of elements, and back.
template <class E>
MC_DEVICE uint32_t pack_pair(float low, float high);
template <class E>
MC_DEVICE float low_of(uint32_t pair) {
    return E::widen(static_cast<uint16_t>(pair & 0xffff));
}
template <class E>
MC_DEVICE float high_of(uint32_t pair) {
    return E::widen(static_cast<uint16_t>(pair >> 16));
}
// Products of a pair's elements, rounded once.
template <class E>
MC_DEVICE uint32_t scale_pair(uint32_t pair, uint32_t by);

// c += A B; a: rows g and g + 8 of columns 2c, 2c + 1, then of the other two; b likewise.
template <class E>
MC_DEVICE void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1);

#if defined(__CUDACC__)

template <>
MC_DEVICE uint32_t pack_pair<Half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
MC_DEVICE uint32_t pack_pair<Bfloat>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
MC_DEVICE float low_of<Bfloat>(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
template <>
MC_DEVICE float high_of<Bfloat>(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}
template <>
MC_DEVICE uint32_t scale_pair<Half>(uint32_t pair, uint32_t by) {
    const __half2 out = __hmul2(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&by));
    return *reinterpret_cast<const uint32_t*>(&out);
}
template <>
MC_DEVICE uint32_t scale_pair<Bfloat>(uint32_t pair, uint32_t by) {
    const __nv_bfloat162 out =
        __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), *reinterpret_cast<const __nv_bfloat162*>(&by));
    return *reinterpret_cast<const uint32_t*>(&out);
}

template <>
MC_DEVICE void multiply_16x8x16<Half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                      uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
MC_DEVICE void multiply_16x8x16<Bfloat>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of pairs' elements, row g and columns 2c, 2c + 1 in lane 4 g + c, transposed.
MC_DEVICE uint32_t transpose_8x8(uint32_t pair) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + r points at row r of matrix i, and has of each
// matrix row g, elements 2c and 2c + 1; kTurned: of its transpose.
template <bool kTurned>
MC_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (kTurned) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    }
}

#else

template <class E>
MC_DEVICE uint32_t pack_pair(float low, float high) {
    return E::narrow(low) | static_cast<uint32_t>(E::narrow(high)) << 16;
}

template <class E>
MC_DEVICE uint32_t scale_pair(uint32_t pair, uint32_t by) {
    return pack_pair<E>(low_of<E>(pair) * low_of<E>(by), high_of<E>(pair) * high_of<E>(by));
}

template <class E>
MC_DEVICE void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
    emulate::Words all[32];
    emulate::exchange_all({a0 | static_cast<uint64_t>(a1) << 32, a2 | static_cast<uint64_t>(a3) << 32,
                           b0 | static_cast<uint64_t>(b1) << 32},
                          all);
    const auto element = [](uint64_t words, int i) { return E::widen(static_cast<uint16_t>(words >> 16 * i)); };
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2, lower = i / 2 * 2;
        for (int k = 0; k < 4; ++k) {
            const uint64_t x01 = all[4 * row + k][0], x23 = all[4 * row + k][1], y = all[4 * column + k][2];
            c[i] += element(x01, lower) * element(y, 0) + element(x01, lower + 1) * element(y, 1) +
                    element(x23, lower) * element(y, 2) + element(x23, lower + 1) * element(y, 3);
        }
    }
}

MC_DEVICE uint32_t transpose_8x8(uint32_t pair) {
    emulate::Words all[32];
    emulate::exchange_all({pair}, all);
    const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = lane % 4;
    const auto element = [&](int r, int c) {
        return static_cast<uint32_t>(all[4 * r + c / 2][0] >> 16 * (c % 2)) & 0xffff;
    };
    return element(2 * column, row) | element(2 * column + 1, row) << 16;
}

template <bool kTurned>
MC_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
    emulate::check_shared(row, 16);
    emulate::Words all[32];
    emulate::exchange_all({reinterpret_cast<uintptr_t>(row)}, all);
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
        const auto element = [&](int r, int at) {
            return static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(all[8 * i + r][0])[at]);
        };
        to[i] = kTurned ? element(c, g) | element(c + 1, g) << 16 : element(g, c) | element(g, c + 1) << 16;
    }
}

#endif

// The lower, or upper, elements of two pairs as a pair.
MC_DEVICE uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
MC_DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// c [16, 8] += A B over 32 columns of A: rows g and g + 8 of A, row g of B^T.
template <class E>
MC_DEVICE void multiply(float (&c)[4], const Quad& upper, const Quad& lower, const Quad& column) {
    multiply_16x8x16<E>(c, upper.x[0], lower.x[0], upper.x[1], lower.x[1], column.x[0], column.x[1]);
    multiply_16x8x16<E>(c, upper.x[2], lower.x[2], upper.x[3], lower.x[3], column.x[2], column.x[3]);
}

// Where a lane points for `load_matrices`, in elements from the start of 16 x 16 elements with rows `step` apart.
// As A, or, kTurned, as two Bs [16, 8] side by side (B^T in memory: `right_at` without kTurned).
MC_DEVICE int left_at(int lane, int step) { return lane % 16 * step + lane / 16 * 8; }
MC_DEVICE int right_at(int lane, int step) { return (lane % 8 + lane / 16 * 8) * step + lane / 8 % 2 * 8; }

// Of a warp: C [16, 16] += A B with operands in shared memory; fp32, which tensor cores would round, by fused
// multiply-adds: a lane has half a row then, elements [row][first .. first + 7].
template <class E>
struct WarpSums {
    using Bits = typename E::Bits;
    static constexpr bool kTensor = sizeof(Bits) == 2;
    float x[2][4] = {};

    static MC_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }

    // a [16, 16] row after row, b [16, 16] likewise or (kTurned) column after column.
    template <bool kTurned>
    MC_DEVICE void add(const Bits* a, int a_step, const Bits* b, int b_step) {
        if constexpr (kTensor) {
            uint32_t left[4], right[4];
            load_matrices<false>(left, a + left_at(lane(), a_step));
            load_matrices<!kTurned>(right, b + (kTurned ? right_at(lane(), b_step) : left_at(lane(), b_step)));
            multiply_16x8x16<E>(x[0], left[0], left[1], left[2], left[3], right[0], right[1]);
            multiply_16x8x16<E>(x[1], left[0], left[1], left[2], left[3], right[2], right[3]);
        } else {
            const int row = lane() / 2, first = lane() % 2 * 8;
#pragma unroll 4  // for the compiler's time
            for (int k = 0; k < 16; ++k) {
                const float l = E::widen(a[row * a_step + k]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    x[i / 4][i % 4] += l * E::widen(kTurned ? b[(first + i) * b_step + k] : b[k * b_step + first + i]);
                }
            }
        }
    }

    MC_DEVICE void store(float* to, int step) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = kTensor ? lane() / 4 + i / 2 % 2 * 8 : lane() / 2;
            const int column = kTensor ? i / 4 * 8 + 2 * (lane() % 4) + i % 2 : lane() % 2 * 8 + i;
            to[row * step + column] = x[i / 4][i % 4];
        }
    }
};

}  // namespace mc::cuda
