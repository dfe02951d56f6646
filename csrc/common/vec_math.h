// Functions of vectors, written once over `Vec`. Included after vec_<level>.h; for what may be used here see there.
#pragma once

namespace mc {
namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
constexpr float kLog2E = 1.44269504088896340736f;

inline Vec load(const float* p) { return Vec::load(F32{}, reinterpret_cast<const char*>(p)); }
inline void store(float* p, Vec x) { Vec::store(F32{}, reinterpret_cast<char*>(p), x); }

// 2^x for x <= 0, relative error about one rounding; 0 below 2^-126.5, NaN for NaN.
inline Vec exp2(Vec x) {
    x = greater(Vec::all(-127.0f), x);
    const Vec t = add(x, Vec::all(kRounder));
    const Vec f = sub(x, sub(t, Vec::all(kRounder)));  // [-1/2, 1/2]; the Taylor series errs by 5e-9
    Vec y = Vec::all(1.52527338040598e-5f);
    y = fmadd(y, f, Vec::all(1.54035303933816e-4f));
    y = fmadd(y, f, Vec::all(1.33335581464284e-3f));
    y = fmadd(y, f, Vec::all(9.61812910762848e-3f));
    y = fmadd(y, f, Vec::all(5.55041086648216e-2f));
    y = fmadd(y, f, Vec::all(2.40226506959101e-1f));
    y = fmadd(y, f, Vec::all(6.93147180559945e-1f));
    y = fmadd(y, f, Vec::all(1.0f));
    return mul(y, power_of_two(t));
}

// x / (1 + e^-x), from the exponential of -|x|, which cannot overflow: (positive part - negative part e^-|x|) by
// (1 + e^-|x|). gist_encode has a shorter one, which is wrong for -infinity.
inline Vec silu(Vec x) {
    const Vec zero = Vec::all(0.0f), minus = sub(zero, x), above = greater(zero, x), below = greater(zero, minus);
    const Vec e = exp2(mul(greater(x, minus), Vec::all(-kLog2E)));
    return div(fnmadd(below, e, above), add(Vec::all(1.0f), e));
}

}  // namespace
}  // namespace mc
