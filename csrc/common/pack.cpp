// Packing of panels. Not per level: it moves memory.
#include <algorithm>
#include <cstring>

#include "matmul.h"
#include "vec_scalar.h"

namespace mc {
namespace {

// The kPanel steps of a few rows at a time: source and destination lines stay in the first-level cache.
constexpr int64_t kStepsAtOnce = 16;

struct PairOfBF16 {
    static constexpr int kBytes = 4;
};
inline uint32_t bits_of(PairOfBF16, uint32_t u) { return u; }
template <class T>
inline uint32_t bits_of(T t, typename Stored<T>::type raw) {
    return as_bits(decode(t, raw));
}

// whole: steps that every row has in full.
template <class T, class Raw>
void pack(const char* w, int64_t step, int64_t n, int64_t whole, char* out) {
    for (int64_t s0 = 0; s0 < whole; s0 += kStepsAtOnce) {
        const int64_t count = std::min(kStepsAtOnce, whole - s0);
        for (int64_t j = 0; j < n; ++j) {
            const char* from = w + j * step + s0 * T::kBytes;
            char* to = out + (s0 * kPanel + j) * 4;
            for (int64_t s = 0; s < count; ++s) {
                Raw raw;
                std::memcpy(&raw, from + s * T::kBytes, sizeof raw);
                const uint32_t u = bits_of(T{}, raw);
                std::memcpy(to + s * kPanel * 4, &u, 4);
            }
        }
    }
}

}  // namespace

void pack_panel(int dtype, const char* w, int64_t step, int64_t n, int64_t k, int type, char* out) {
    const int64_t whole = type == kBF16 ? k / 2 : k, steps = product_steps(type, k), line = kPanel * 4;
    if (type == kBF16) {
        pack<PairOfBF16, uint32_t>(w, step, n, whole, out);
    } else if (dtype == kF32) {
        pack<F32, uint32_t>(w, step, n, whole, out);
    } else if (dtype == kBF16) {
        pack<BF16, uint16_t>(w, step, n, whole, out);
    } else {
        pack<F16, uint16_t>(w, step, n, whole, out);
    }
    if (n < kPanel) {
        for (int64_t s = 0; s < whole; ++s) std::memset(out + s * line + n * 4, 0, static_cast<size_t>(line - n * 4));
    }
    std::memset(out + whole * line, 0, static_cast<size_t>((steps - whole) * line));
    for (int64_t j = 0; type == kBF16 && k % 2 && j < n; ++j) {
        std::memcpy(out + whole * line + j * 4, w + j * step + (k - 1) * 2, 2);  // the lower half: little-endian
    }
}

}  // namespace mc
