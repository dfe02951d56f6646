// Matrix products with AVX-512 BF16; those of F32 are AVX-512's.
#include "matmul.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "vec_avx512.h"
#include "matmul_impl.h"

namespace mc {
namespace {

struct PairStep {
    using Operand = __m512i;
    static __m512i splat(const char* p) { return _mm512_set1_epi32(*reinterpret_cast<const Unaligned*>(p)); }
    static __m512i load(const char* p) { return _mm512_loadu_si512(p); }
    static Vec step(__m512i a, __m512i w, Vec sum) {
        return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(w))};
    }

private:
    typedef int Unaligned __attribute__((aligned(1), may_alias));
};

}  // namespace

const MatmulOps* matmul_avx512bf16() {
    static const MatmulOps table = {{matmul_avx512()->multiply[kF32], nullptr, multiply<PairStep, 2, 14>}, nullptr, false};
    return &table;
}

}  // namespace mc

#else

const mc::MatmulOps* mc::matmul_avx512bf16() { return nullptr; }

#endif
