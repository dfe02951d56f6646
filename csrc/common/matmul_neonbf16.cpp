// Matrix products with Arm's products of bf16; those of F32 are NEON's.
#include "matmul.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

#include "vec_neon.h"
#include "matmul_impl.h"

namespace mc {
namespace {

struct PairStep {
    using Operand = bfloat16x8_t;
    static Operand splat(const char* p) {
        return vreinterpretq_bf16_u32(vdupq_n_u32(*reinterpret_cast<const Unaligned*>(p)));
    }
    static Operand load(const char* p) { return vreinterpretq_bf16_u8(load_bytes16(p)); }
    static Vec step(Operand a, Operand w, Vec sum) { return {vbfdotq_f32(sum.v, a, w)}; }

private:
    typedef uint32_t Unaligned __attribute__((aligned(1), may_alias));
};

}  // namespace

const MatmulOps* matmul_neonbf16() {
    static const MatmulOps table = {{matmul_neon()->multiply[kF32], nullptr, multiply<PairStep, 4, 5>}, nullptr, false};
    return &table;
}

}  // namespace mc

#else

const mc::MatmulOps* mc::matmul_neonbf16() { return nullptr; }

#endif
