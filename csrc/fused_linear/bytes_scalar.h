// Bytes in portable C++, see packed_impl.h. Included after vec_scalar.h.
#pragma once

#include "starts.h"

namespace mc {
namespace {

struct Bytes {
    uint8_t v[4 * Vec::kWidth];
};
constexpr bool kWholeBytes = true;
constexpr int64_t kFourBitRows = 4, kEightBitRows = 4;

inline Bytes load_bytes(const char* p) {
    Bytes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Bytes lower(Bytes b) {
    for (uint8_t& byte : b.v) byte &= 15;
    return b;
}
inline Bytes upper(Bytes b) {
    for (uint8_t& byte : b.v) byte = static_cast<uint8_t>(byte >> 4);
    return b;
}
inline Bytes lower_bytes(Bytes b, const Bytes& c) {
    for (int i = 0; i < 4 * Vec::kWidth; ++i) b.v[i] = static_cast<uint8_t>((b.v[i] & 15) | c.v[i] << 4);
    return b;
}
inline Bytes upper_bytes(Bytes b, const Bytes& c) {
    for (int i = 0; i < 4 * Vec::kWidth; ++i) b.v[i] = static_cast<uint8_t>(b.v[i] >> 4 | (c.v[i] & 0xf0));
    return b;
}

struct Products {
    int32_t v[Vec::kWidth];

    static Products all(int32_t start) {
        Products out;
        for (int32_t& sum : out.v) sum = start;
        return out;
    }
    static int32_t start(const int8_t* x, int bits) { return start_of_sum(x, bits); }
    Products add(const Bytes& codes, int32_t x) const {
        int8_t four[4];
        std::memcpy(four, &x, sizeof four);
        Products out = *this;
        for (int i = 0; i < Vec::kWidth; ++i) {
            for (int k = 0; k < 4; ++k) out.v[i] += codes.v[4 * i + k] * four[k];
        }
        return out;
    }
    static Vec value(const Products& high, const Products& low) {
        Vec out;
        for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = static_cast<float>(256 * high.v[i] + low.v[i]);
        return out;
    }
};

}  // namespace
}  // namespace mc
