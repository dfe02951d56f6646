// Instruction set levels: detection and choice.
//
// A level needs two permissions: CPUID says that the processor has the instructions, XGETBV that the operating system
// saves the registers they use (a kernel booted with clearcpuid or noxsave, some hypervisors and old systems do not).
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mc {
namespace {

struct Features {
    bool avx2 = false, avx512 = false;
};

#if defined(__x86_64__)
uint64_t xcr0() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

Features detect() {
    Features out;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return out;
    const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
    if (!(osxsave && avx && fma && f16c)) return out;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return out;
    const uint64_t saved = xcr0();
    const uint64_t ymm = 0x6, zmm = 0xe6;  // SSE and AVX; with opmasks and both halves of the upper registers
    out.avx2 = bit(b, 5) && (saved & ymm) == ymm;
    const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
    out.avx512 = out.avx2 && f && dq && bw && vl && (saved & zmm) == zmm;
    return out;
}
#else
Features detect() { return {}; }
#endif

struct Level {
    const RowOps* ops;
    bool here;
};

constexpr int kLevels = 3;

// Slowest first.
const Level* levels() {
    static const Features have = detect();
    static const Level table[kLevels] = {{rows_scalar(), true}, {rows_avx2(), have.avx2}, {rows_avx512(), have.avx512}};
    return table;
}

const RowOps* find(const char* name) {
    for (int i = 0; i < kLevels; ++i) {
        const Level& level = levels()[i];
        if (level.ops && level.here && !std::strcmp(level.ops->name, name)) return level.ops;
    }
    return nullptr;
}

std::string names() {
    std::string out;
    for (int i = 0; i < kLevels; ++i) {
        const Level& level = levels()[i];
        if (level.ops && level.here) out += (out.empty() ? "" : ", ") + std::string(level.ops->name);
    }
    return out;
}

[[noreturn]] void not_here(const char* what, const char* name) {
    throw Error(MC_UNAVAILABLE, std::string(what) + ": expected one of " + names() +
                                    " (the levels of this machine), got '" + name + "'");
}

const RowOps* choose_at_start() {
    const char* wanted = std::getenv("MC_CPU_ISA");
    if (wanted && *wanted) {
        const RowOps* ops = find(wanted);
        if (!ops) not_here("MC_CPU_ISA", wanted);
        return ops;
    }
    const RowOps* best = nullptr;
    for (int i = 0; i < kLevels; ++i) {
        if (levels()[i].ops && levels()[i].here) best = levels()[i].ops;
    }
    return best;
}

std::atomic<const RowOps*> in_use{nullptr};

}  // namespace

const RowOps& row_ops() {
    const RowOps* ops = in_use.load(std::memory_order_acquire);
    if (!ops) {
        ops = choose_at_start();
        const RowOps* none = nullptr;  // a level that mc_set_cpu_isa has set meanwhile stays
        if (!in_use.compare_exchange_strong(none, ops, std::memory_order_acq_rel)) ops = none;
    }
    return *ops;
}

}  // namespace mc

extern "C" const char* mc_cpu_isa(void) {
    const char* name = nullptr;
    mc::guarded([&] { name = mc::row_ops().name; });
    return name;
}

extern "C" int32_t mc_cpu_isa_available(const char* name) { return name && mc::find(name) ? 1 : 0; }

extern "C" int32_t mc_set_cpu_isa(const char* name) {
    return mc::guarded([&] {
        const mc::RowOps* ops = name ? mc::find(name) : mc::choose_at_start();
        if (!ops) mc::not_here("mc_set_cpu_isa", name);
        mc::in_use.store(ops, std::memory_order_release);
    });
}
