#include "scratch.h"

#include <cstring>
#include <new>

namespace mc {
namespace {

constexpr std::align_val_t kLine{64};
constexpr size_t kLeast = 64 << 10;   // what the system's allocator keeps by itself
constexpr size_t kMost = 32 << 20;    // of a thread's kept blocks together
constexpr int kBlocks = 8;

// Under a sanitizer every block is its own, so that what is written beyond it or after its end is seen, and full of NaNs, so
// that what is read of it before it is written is seen too.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif
#else
constexpr bool kKeeps = true;
#endif

struct Kept {
    void* p = nullptr;
    size_t bytes = 0;
};

struct Blocks {
    Kept kept[kBlocks];
    size_t total = 0;

    ~Blocks() {
        for (Kept& k : kept) ::operator delete(k.p, kLine);
    }
};

thread_local Blocks blocks;

// Sizes are rounded up, so that calls of nearly one shape find each other's.
size_t whole(size_t bytes) {
    size_t step = kLeast;
    while (step * 8 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

}  // namespace

void* take_scratch(size_t bytes) {
    if (!kKeeps) return std::memset(::operator new(bytes, kLine), 0xff, bytes);
    if (bytes < kLeast) return ::operator new(bytes, kLine);
    const size_t size = whole(bytes);
    for (Kept& k : blocks.kept) {
        if (k.bytes != size) continue;
        blocks.total -= size;
        k.bytes = 0;
        return std::exchange(k.p, nullptr);
    }
    return ::operator new(size, kLine);
}

void give_back_scratch(void* p, size_t bytes) noexcept {
    const size_t size = whole(bytes);
    if (kKeeps && bytes >= kLeast && blocks.total + size <= kMost) {
        for (Kept& k : blocks.kept) {
            if (k.p) continue;
            k = {p, size};
            blocks.total += size;
            return;
        }
    }
    ::operator delete(p, kLine);
}

}  // namespace mc
