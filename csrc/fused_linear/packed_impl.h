// A few rows of x by a packed W (mc_packed_weight), in whole numbers.
//
// Included by linear_<level>.cpp after the level's vectors and what it does with bytes (`Products`, below). With a block's
// scale s, offset m and codes c, its part of a sum is
//
//   sum of (s c + m) x  =  s (sum of (c - h) x)  +  (m + h s) (sum of x),    h = 8, or 128 for codes of 8 bits
//
// where h, the middle of the codes, keeps the two parts from being large and of opposite signs.
//
// x is brought to whole numbers first, q = x / t, of its block's own t: |q| <= 127 * 256 for x of bf16, so that q is two
// signed bytes and an element is wrong by 2^-16 of the block's largest at most (bf16 is by 2^-9 of itself); for x of fp32 a
// byte more. Sums of codes by bytes are exact, and begin with -h (sum of q). A register has 4 elements of each row, which
// meet the same 4 of x in all its lanes: scales, offsets and sums are vectors of rows, and nothing is summed across a
// register.
//
// The 8 elements of a part of a block lie in x in the order in which the bytes of a row's two words hold their codes:
// 0 4 1 5 are the lower four bits, 2 6 3 7 the upper.
//
// A level gives
//
//   Bytes                        a register: 4 bytes of each of Vec::kWidth rows
//   load_bytes(p)
//   lower(b), upper(b)           the lower and the upper four bits of each byte
//   Products                     sums by rows of codes, at most 15 and of a block's 32 elements, with signed bytes
//     all(start), add(codes, x), value(high, low): 256 high + low as Vec
//     start(x, bits): 4 bytes for `all`, from a block's signed bytes in their order here, to begin with -h (sum of x)
//   kFourBitRows, kEightBitRows  LinearOps::packed_rows
//   kWholeBytes                  whether codes may be up to 255; then also
//   lower_bytes(b, c), upper_bytes(b, c): lower and upper bits of b, with those of c above them
#pragma once

#include <cstdint>

#include "fetch.h"
#include "linear.h"
#include "packed.h"
#include "vec_math.h"

namespace mc {
namespace {

// The first four bytes of eight alternate with the others.
inline uint64_t in_the_order_of_codes(uint64_t x) {
    auto spread = [](uint64_t four) {
        four = (four | four << 16) & 0x0000ffff0000ffff;
        return (four | four << 8) & 0x00ff00ff00ff00ff;
    };
    return spread(x & 0xffffffff) | spread(x >> 32) << 8;
}

constexpr int64_t kBlocksAtOnce = 16;

// What a block's numbers are multiplied with; its scale and sum. wrong: not 0 where one is infinite or none.
template <int kPlanes>
inline float scale_block(const float* x, float* scale, float* sum_of_x, Vec& wrong) {
    constexpr float kMost = 127 << (8 * (kPlanes - 1));
    const Vec zero = Vec::all(0.0f);
    Vec most = zero, total = zero;
    for (int64_t i = 0; i < kPackedBlock; i += Vec::kWidth) {
        const Vec v = load(x + i);
        most = greater(most, greater(v, sub(zero, v)));
        total = add(total, v);
        wrong = fmadd(v, zero, wrong);
    }
    const float largest = greatest(most);
    const bool counts = largest > 1e-30f;  // else 1 / t would not be a number
    *scale = counts ? largest / kMost : 0.0f;
    *sum_of_x = sum(total);
    return counts ? kMost / largest : 0.0f;
}

// Loops that compilers make vectors of.
template <int kPlanes>
inline void round_block(const float* x, float by, int32_t* whole) {
    // An infinity or NaN, of which nothing is read, must not meet the conversion.
    const Vec zero = Vec::all(0.0f), least = Vec::all(-2.0f * (127 << (8 * (kPlanes - 1))));
    float near[kPackedBlock];
    for (int64_t i = 0; i < kPackedBlock; i += Vec::kWidth) {
        const Vec q = greater(mul(load(x + i), Vec::all(by)), least);
        store(near + i, sub(zero, greater(sub(zero, q), least)));
    }
    for (int i = 0; i < kPackedBlock; ++i) {
        whole[i] = static_cast<int32_t>(near[i] + __builtin_copysignf(0.5f, near[i]));
    }
}

// The lowest bytes of n blocks, in the order of codes, to `eights`; the rest stays.
inline void take_bytes(int32_t* whole, int64_t n, uint64_t* eights) {
    int8_t* bytes = reinterpret_cast<int8_t*>(eights);
    for (int64_t i = 0; i < n * kPackedBlock; ++i) {
        bytes[i] = static_cast<int8_t>(whole[i]);
        whole[i] = (whole[i] - bytes[i]) >> 8;
    }
    for (int64_t i = 0; i < n * kPackedBlock / 8; ++i) eights[i] = in_the_order_of_codes(eights[i]);
}

// A block is its elements' high bytes and `start` of these, then the same of the next lower ones. A few blocks go each step of
// the way together: for one it is a long chain.
template <int kPlanes>
bool to_planes(const BytesOfRow& a) {
    const int64_t blocks = a.n / kPackedBlock;
    Vec wrong = Vec::all(0.0f);
    float by[kBlocksAtOnce];
    int32_t whole[kBlocksAtOnce * kPackedBlock];
    uint64_t eights[kBlocksAtOnce * kPackedBlock / 8];
    const auto* bytes = reinterpret_cast<const int8_t*>(eights);
    for (int64_t first = 0; first < blocks; first += kBlocksAtOnce) {
        const int64_t n = blocks - first < kBlocksAtOnce ? blocks - first : kBlocksAtOnce;
        const float* x = a.x + first * kPackedBlock;
        for (int64_t b = 0; b < n; ++b) {
            by[b] = scale_block<kPlanes>(x + b * kPackedBlock, a.scales + first + b, a.sums + first + b, wrong);
        }
        for (int64_t b = 0; b < n; ++b) round_block<kPlanes>(x + b * kPackedBlock, by[b], whole + b * kPackedBlock);
        for (int plane = kPlanes - 1; plane >= 0; --plane) {
            take_bytes(whole, n, eights);
            char* out = a.bytes + (first * kPlanes + plane) * kPlaneBytes;
            for (int64_t b = 0; b < n; ++b, out += kPlanes * kPlaneBytes) {
                const int32_t start = Products::start(bytes + b * kPackedBlock, a.bits);
                __builtin_memcpy(out, bytes + b * kPackedBlock, kPackedBlock);
                __builtin_memcpy(out + kPackedBlock, &start, sizeof start);
            }
        }
    }
    return sum(wrong) == 0.0f;
}

bool to_bytes(const BytesOfRow& a) { return a.planes == 2 ? to_planes<2>(a) : to_planes<3>(a); }

inline int32_t four_of_x(const char* p) {
    int32_t out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
}

// sums[j] = sum of (c - h) q_j over a block, for Vec::kWidth rows of W from w on; codes of four bits, or with kBytes of
// eight. Without kCentred: of c q_j.
template <int kPlanes, int kX, bool kBytes, bool kCentred>
inline void sums_of_products(const char* w, const char* x, int64_t x_step, Vec* sums) {
    Products parts[kX][kPlanes];
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int p = 0; p < kPlanes; ++p) {
            parts[j][p] = Products::all(kCentred ? four_of_x(x + j * x_step + p * kPlaneBytes + kPackedBlock) : 0);
        }
    }
    auto multiply = [&](Bytes codes, int at) {
        MC_UNROLL for (int j = 0; j < kX; ++j) {
            MC_UNROLL for (int p = 0; p < kPlanes; ++p) {
                parts[j][p] = parts[j][p].add(codes, four_of_x(x + j * x_step + p * kPlaneBytes + at));
            }
        }
    };
    MC_UNROLL for (int q = 0; q < 4; ++q) {
        const Bytes bits = load_bytes(w + 64 * q);
        if constexpr (kBytes) {
            const Bytes more = load_bytes(w + kPackedBits + 64 * q);
            multiply(lower_bytes(bits, more), 8 * q);
            multiply(upper_bytes(bits, more), 8 * q + 4);
        } else {
            multiply(lower(bits), 8 * q);
            multiply(upper(bits), 8 * q + 4);
        }
    }
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        sums[j] = Products::value(parts[j][kPlanes - 2], parts[j][kPlanes - 1]);
        if constexpr (kPlanes == 3) {
            sums[j] = fmadd(Products::value(Products::all(0), parts[j][0]), Vec::all(65536.0f), sums[j]);
        }
    }
}

// kPackedRows rows by kX rows of x from `first` on, in one stream: two groups side by side are faster out of a cache and
// much slower out of memory. kFetch: `ahead` on is fetched meanwhile.
template <int kBits, int kPlanes, int kX, bool kFetch>
inline void packed_rows(const DotPacked& a, const char* w, const char* ahead, int64_t first, float* out) {
    constexpr int kVecs = kPackedRows / Vec::kWidth;
    const int64_t blocks = a.n / kPackedBlock;
    const char* x = a.x + first * a.x_step;
    const float *scales = a.scales + first * blocks, *sums = a.sums + first * blocks;
    Vec total[kX][kVecs];
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int i = 0; i < kVecs; ++i) total[j][i] = Vec::all(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b, x += kPlanes * kPlaneBytes) {
        if constexpr (kFetch) ahead = fetch<kBits / 4 * kPackedBits + 8 * kPackedRows>(ahead);
        const auto* numbers = reinterpret_cast<const float*>(w + kBits / 4 * kPackedBits);
        MC_UNROLL for (int i = 0; i < kVecs; ++i) {
            const char* rows = w + i * 4 * Vec::kWidth;
            Vec codes[kX], high[kX];
            constexpr bool kInHalves = kBits == 8 && !kWholeBytes;
            sums_of_products<kPlanes, kX, kBits == 8 && kWholeBytes, !kInHalves>(rows, x, a.x_step, codes);
            if constexpr (kInHalves) {  // c - 128 = low + 16 (high - 8)
                sums_of_products<kPlanes, kX, false, true>(rows + kPackedBits, x, a.x_step, high);
                MC_UNROLL for (int j = 0; j < kX; ++j) codes[j] = fmadd(high[j], Vec::all(16.0f), codes[j]);
            }
            const Vec scale = load(numbers + i * Vec::kWidth);
            const Vec middle = fmadd(scale, Vec::all(1 << (kBits - 1)), load(numbers + kPackedRows + i * Vec::kWidth));
            MC_UNROLL for (int j = 0; j < kX; ++j) {
                const Vec by_codes = mul(codes[j], Vec::all(scales[j * blocks + b]));
                total[j][i] = fmadd(scale, by_codes, fmadd(middle, Vec::all(sums[j * blocks + b]), total[j][i]));
            }
        }
        w += packed_block_bytes(kBits);
    }
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int i = 0; i < kVecs; ++i) store(out + (first + j) * kColumns + i * Vec::kWidth, total[j][i]);
    }
}

template <int kBits, int kPlanes>
void packed_columns(const DotPacked& a) {
    const int64_t step = a.n / kPackedBlock * packed_block_bytes(kBits);
    const Ahead ahead(a.w, a.next, (a.w_rows + kPackedRows - 1) / kPackedRows, 1, step);
    for (int64_t row = 0; row < a.w_rows; row += kPackedRows) {
        const char* w = a.w + row / kPackedRows * step;
        auto rows = [&](int64_t r, auto fetches) {
            const char* next = ahead.of(row / kPackedRows);
            switch (a.x_rows - r) {
                case 1: return packed_rows<kBits, kPlanes, 1, fetches.value>(a, w, next, r, a.out + row);
                case 2: return packed_rows<kBits, kPlanes, 2, fetches.value>(a, w, next, r, a.out + row);
                case 3: return packed_rows<kBits, kPlanes, 3, fetches.value>(a, w, next, r, a.out + row);
                default: return packed_rows<kBits, kPlanes, kPackedX, fetches.value>(a, w, next, r, a.out + row);
            }
        };
        a.fetch ? rows(0, Fetches<true>{}) : rows(0, Fetches<false>{});
        // After the first four rows of x, W is in a core's own caches.
        for (int64_t r = kPackedX; r < a.x_rows; r += kPackedX) rows(r, Fetches<false>{});
    }
}

void dot_packed(const DotPacked& a) {
    if (a.bits == 8) return a.planes == 2 ? packed_columns<8, 2>(a) : packed_columns<8, 3>(a);
    a.planes == 2 ? packed_columns<4, 2>(a) : packed_columns<4, 3>(a);
}

// A level that reads packed weights in its own way, and does all else as another.
inline LinearOps with_packed(const LinearOps& rest, const char* name) {
    LinearOps ops = rest;
    ops.name = name;
    ops.to_bytes = to_bytes;
    ops.dot_packed = dot_packed;
    ops.packed_rows[0] = kFourBitRows;
    ops.packed_rows[1] = kEightBitRows;
    return ops;
}

}  // namespace
}  // namespace mc
