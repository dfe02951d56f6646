// A float as its bits. In an unnamed namespace, without inline functions of the standard library: the linker keeps one copy
// of an inline function, and code for every instruction set includes this.
#pragma once

#include <cstdint>
#include <cstring>

namespace mc {
namespace {

inline float as_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline uint32_t as_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

}  // namespace
}  // namespace mc
