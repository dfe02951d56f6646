// Instruction set levels: detection and choice.
//
// A level needs two permissions: CPUID says that the processor has the instructions, XGETBV that the operating system
// saves the registers they use (a kernel booted with clearcpuid or noxsave, some hypervisors and old systems do not).
// AMX needs a third: Linux saves a process's tiles once it has asked for that. Of an Arm the system says what it has.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mc {
namespace {

struct Features {
    bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;
    bool intel = false;
    bool neon = false, neondot = false, neonbf16 = false;
};

#if defined(__x86_64__)
uint64_t xcr0() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

Features detect() {
    Features out;
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return out;
    out.intel = b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return out;
    const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
    if (!(osxsave && avx && fma && f16c)) return out;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return out;
    const uint64_t saved = xcr0();
    const uint64_t ymm = 0x6, zmm = 0xe6;  // SSE and AVX; with opmasks and both halves of the upper registers
    out.avx2 = bit(b, 5) && (saved & ymm) == ymm;
    const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
    out.avx512 = out.avx2 && f && dq && bw && vl && (saved & zmm) == zmm;
    const bool tile = bit(d, 24), tile_bf16 = bit(d, 22);
    const bool vnni = bit(c, 11);
    out.avx512bf16 = out.avx512 && vnni && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
    const uint64_t tiles = 0x60000;  // their shapes and their data
    out.amx = out.avx512bf16 && tile && tile_bf16 && (saved & tiles) == tiles && may_use_tiles();
    return out;
}
#elif defined(__aarch64__) && defined(__linux__)
// Linux's words of what a program may use, asm/hwcap.h: older headers do not name all of them.
bool dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }         // HWCAP2_BF16
bool mixed_signs() { return getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
bool dot_products() { return has("hw.optional.arm.FEAT_DotProd"); }
bool bf16() { return has("hw.optional.arm.FEAT_BF16"); }
bool mixed_signs() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
bool dot_products() { return false; }
bool bf16() { return false; }
bool mixed_signs() { return false; }
#endif

#if defined(__aarch64__)
Features detect() {
    Features out;
    out.neon = true;  // of every 64-bit Arm
    out.neondot = dot_products();
    out.neonbf16 = out.neondot && bf16() && mixed_signs();
    return out;
}
#elif !defined(__x86_64__)
Features detect() { return {}; }
#endif

constexpr int kLevels = 9;

const Features& features() {
    static const Features have = detect();
    return have;
}

// Slowest first. A level without units of its own for an op has those of the level below.
const IsaLevel* levels() {
    static const Features& have = features();
    static const IsaLevel table[kLevels] = {
        {"amx-emulated", rows_scalar(), matmul_emulated(), true, true, "scalar"},
        {"scalar", rows_scalar(), matmul_scalar(), true, false, "scalar"},
        {"avx2", rows_avx2(), matmul_avx2(), have.avx2, false, "avx2"},
        {"avx512", rows_avx512(), matmul_avx512(), have.avx512, false, "avx512"},
        {"avx512bf16", rows_avx512(), matmul_avx512bf16(), have.avx512bf16, false, "avx512bf16"},
        {"amx", rows_avx512(), matmul_amx(), have.amx, false, "avx512bf16"},
        {"neon", rows_neon(), matmul_neon(), have.neon, false, "neon"},
        {"neondot", rows_neon(), matmul_neon(), have.neondot, false, "neondot"},
        {"neonbf16", rows_neon(), matmul_neonbf16(), have.neonbf16, false, "neonbf16"},
    };
    return table;
}

bool serves(const IsaLevel& level) { return level.rows && level.matmul && level.here; }

const IsaLevel* find(const char* name) {
    for (int i = 0; i < kLevels; ++i) {
        const IsaLevel& level = levels()[i];
        if (serves(level) && !std::strcmp(level.name, name)) return &level;
    }
    return nullptr;
}

std::string names() {
    std::string out;
    for (int i = 0; i < kLevels; ++i) {
        const IsaLevel& level = levels()[i];
        if (serves(level)) out += (out.empty() ? "" : ", ") + std::string(level.name);
    }
    return out;
}

[[noreturn]] void not_here(const char* what, const char* name) {
    throw Error(MC_UNAVAILABLE, std::string(what) + ": expected one of " + names() +
                                    " (the levels of this machine), got '" + name + "'");
}

const IsaLevel* choose_at_start() {
    const char* wanted = std::getenv("MC_CPU_ISA");
    if (wanted && *wanted) {
        const IsaLevel* level = find(wanted);
        if (!level) not_here("MC_CPU_ISA", wanted);
        return level;
    }
    const IsaLevel* best = nullptr;
    for (int i = 0; i < kLevels; ++i) {
        const IsaLevel& level = levels()[i];
        if (serves(level) && !level.only_by_name) best = &level;
    }
    return best;
}

std::atomic<const IsaLevel*> in_use{nullptr};

}  // namespace

const IsaLevel& isa_level() {
    const IsaLevel* level = in_use.load(std::memory_order_acquire);
    if (!level) {
        level = choose_at_start();
        const IsaLevel* none = nullptr;  // a level that mc_set_cpu_isa has set meanwhile stays
        if (!in_use.compare_exchange_strong(none, level, std::memory_order_acq_rel)) level = none;
    }
    return *level;
}

bool streams_want_fetches() { return features().intel; }

const RowOps& row_ops() { return *isa_level().rows; }

}  // namespace mc

extern "C" const char* mc_cpu_isa(void) {
    const char* name = nullptr;
    mc::guarded([&] { name = mc::isa_level().name; });
    return name;
}

extern "C" int32_t mc_cpu_isa_available(const char* name) { return name && mc::find(name) ? 1 : 0; }

extern "C" int32_t mc_set_cpu_isa(const char* name) {
    return mc::guarded([&] {
        const mc::IsaLevel* level = name ? mc::find(name) : mc::choose_at_start();
        if (!level) mc::not_here("mc_set_cpu_isa", name);
        mc::in_use.store(level, std::memory_order_release);
    });
}
