// Primitives of fused_linear with AVX-512. Without those flags (another architecture) the level does not exist.
#include "linear.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"

namespace mc {
namespace {

// The next two vectors of a row; of bf16, which is the upper half of an fp32, the even elements, then the odd ones.
template <class T>
inline void load_pair(T t, const char* p, Vec& first, Vec& second) {
    first = Vec::load(t, p);
    second = Vec::load(t, p + Vec::kWidth * T::kBytes);
}
inline void load_pair(BF16, const char* p, Vec& first, Vec& second) {
    const __m512i x = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

}  // namespace
}  // namespace mc

#include "bytes_avx512.h"
#include "packed_impl.h"
#include "linear_impl.h"

namespace mc {

const LinearOps* linear_avx512() {
    static const LinearOps table = linear_table("avx512");
    return &table;
}

}  // namespace mc

#else

const mc::LinearOps* mc::linear_avx512() { return nullptr; }

#endif
