// Primitives of fused_linear with AVX2, FMA and F16C. Without those flags (other machines) the level does not exist.
#include "linear.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"

namespace mc {
namespace {

// The next two vectors of a row; of bf16, which is the upper half of an fp32, the even elements, then the odd ones.
template <class T>
inline void load_pair(T t, const char* p, Vec& first, Vec& second) {
    first = Vec::load(t, p);
    second = Vec::load(t, p + Vec::kWidth * T::kBytes);
}
inline void load_pair(BF16, const char* p, Vec& first, Vec& second) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    first.v = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    second.v = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

}  // namespace
}  // namespace mc

#include "bytes_avx2.h"
#include "packed_impl.h"
#include "linear_impl.h"

namespace mc {

const LinearOps* linear_avx2() {
    static const LinearOps table = linear_table("avx2");
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_avx2() { return nullptr; }

#endif
