// Element types on the device: how their bits widen to fp32 and are rounded from it, once, to nearest even.
#pragma once

#include "device.cuh"
#if !defined(__CUDACC__)
#include "vec_scalar.h"
#endif

namespace mc::cuda {

struct Float {
    using Bits = uint32_t;
    static MC_DEVICE float widen(Bits b) {
#if defined(__CUDACC__)
        return __uint_as_float(b);
#else
        return decode(F32{}, b);
#endif
    }
    static MC_DEVICE Bits narrow(float f) {
#if defined(__CUDACC__)
        return __float_as_uint(f);
#else
        return encode(F32{}, f);
#endif
    }
};

struct Half {
    using Bits = uint16_t;
    static MC_DEVICE float widen(Bits b) {
#if defined(__CUDACC__)
        return __half2float(__ushort_as_half(b));
#else
        return decode(F16{}, b);
#endif
    }
    static MC_DEVICE Bits narrow(float f) {
#if defined(__CUDACC__)
        return __half_as_ushort(__float2half_rn(f));
#else
        return encode(F16{}, f);
#endif
    }
};

struct Bfloat {
    using Bits = uint16_t;
    static MC_DEVICE float widen(Bits b) {
#if defined(__CUDACC__)
        return __uint_as_float(static_cast<uint32_t>(b) << 16);
#else
        return decode(BF16{}, b);
#endif
    }
    static MC_DEVICE Bits narrow(float f) {
#if defined(__CUDACC__)
        return __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
        return encode(BF16{}, f);
#endif
    }
};

}  // namespace mc::cuda
