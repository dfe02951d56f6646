// fp8 elements of a cache on the device: e4m3 without infinities (0x7f and 0xff are NaN). They are read only. Every one of
// them is a number of fp16 and of bf16 too, so that what multiplies 16-bit elements takes them without rounding. Before
// sm_89, which converts a pair in one instruction, the toolkit does it in integers.
#pragma once

#include <type_traits>

#include "fragments.cuh"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

namespace mc::cuda {

struct Fp8 {
    using Bits = uint8_t;
    static MC_DEVICE float widen(Bits b) {
#if defined(__CUDACC__)
        return __half2float(__half(__nv_cvt_fp8_to_halfraw(b, __NV_E4M3)));
#else
        const uint32_t sign = static_cast<uint32_t>(b & 0x80) << 24, magnitude = b & 0x7f;
        if (magnitude == 0x7f) return as_float(sign | 0x7fc00000);
        // Read as an fp32 whose exponent is too small by 120; the multiplication also normalises subnormals.
        return as_float(sign | as_bits(as_float(magnitude << 20) * 0x1p120f));
#endif
    }
};

// Two fp8 elements as a pair of E.
template <class E>
MC_DEVICE uint32_t pair_of(uint32_t two) {
#if defined(__CUDACC__)
    const __half2 pair(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3));
    if constexpr (std::is_same_v<E, Half>) {
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        return pack_pair<E>(__low2float(pair), __high2float(pair));
    }
#else
    return pack_pair<E>(Fp8::widen(static_cast<uint8_t>(two)), Fp8::widen(static_cast<uint8_t>(two >> 8)));
#endif
}

// 8 elements of S as they are loaded, and as an operand of E.
template <class E, class S>
struct Piece {
    using Loaded = Quad;
    static MC_DEVICE Quad of(const Loaded& x) { return x; }
};
template <class E>
struct Piece<E, Fp8> {
    using Loaded = Pack<uint32_t, 2>;
    static MC_DEVICE Quad of(const Loaded& x) {
        return {{pair_of<E>(x.x[0] & 0xffff), pair_of<E>(x.x[0] >> 16), pair_of<E>(x.x[1] & 0xffff),
                 pair_of<E>(x.x[1] >> 16)}};
    }
};

}  // namespace mc::cuda
