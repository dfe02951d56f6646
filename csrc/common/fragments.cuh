// Matrix products of a warp on tensor cores, m16n8k16, with operands that come straight from memory in 16-byte loads.
//
// The instruction wants of lane 4 g + c, of A [16, 16]: rows g and g + 8, columns 2c, 2c + 1, 2c + 8, 2c + 9; of B
// [16, 8]: the same rows of column g. A product does not see the order of its inner dimension, so the lane may hold any
// four columns there as long as A and B agree: here 8 neighbours, 16 bytes, which are two products' worth. So an operand
// goes from memory to registers without shared memory: of 32 columns of a row, lane c of four has its eighth piece, a
// `Quad`; `multiply` takes two rows of A and one of B^T.
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

// c += A B. c: rows g, g, g + 8, g + 8, columns 2c, 2c + 1, 2c, 2c + 1.
template <class E>
MC_DEVICE void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1);
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

#else

template <class E>
MC_DEVICE uint32_t pack_pair(float low, float high) {
    return E::narrow(low) | static_cast<uint32_t>(E::narrow(high)) << 16;
}

template <class E>
MC_DEVICE void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
    uint64_t a01[32], a23[32], b[32];
    emulate::exchange_all(a0 | static_cast<uint64_t>(a1) << 32, a01);
    emulate::exchange_all(a2 | static_cast<uint64_t>(a3) << 32, a23);
    emulate::exchange_all(b0 | static_cast<uint64_t>(b1) << 32, b);
    const auto element = [](uint64_t words, int i) { return E::widen(static_cast<uint16_t>(words >> 16 * i)); };
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i % 2, lower = i / 2 * 2;
        for (int k = 0; k < 4; ++k) {
            const uint64_t x01 = a01[4 * row + k], x23 = a23[4 * row + k], y = b[4 * column + k];
            c[i] += element(x01, lower) * element(y, 0) + element(x01, lower + 1) * element(y, 1) +
                    element(x23, lower) * element(y, 2) + element(x23, lower + 1) * element(y, 3);
        }
    }
}

MC_DEVICE uint32_t transpose_8x8(uint32_t pair) {
    uint64_t all[32];
    emulate::exchange_all(pair, all);
    const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = lane % 4;
    const auto element = [&](int r, int c) {
        return static_cast<uint32_t>(all[4 * r + c / 2] >> 16 * (c % 2)) & 0xffff;
    };
    return element(2 * column, row) | element(2 * column + 1, row) << 16;
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

}  // namespace mc::cuda
