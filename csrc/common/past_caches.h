// A copy that leaves no trace in the caches, for what is not read again soon.
//
// A processor fetches a line before it writes a part of it. Whole lines that are written past the caches (non-temporal
// stores) need no such read: into cold memory that is a third of a copy's traffic. Without SSE2 a plain memcpy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mc {

// dst and src [bytes] do not overlap; of no bytes they may be NULL. Call settle() before another thread may read dst.
inline void copy_past_caches(char* dst, const char* src, int64_t bytes) {
    if (bytes == 0) return;
    int64_t done = 0;
#if defined(__SSE2__)
    constexpr int64_t kLine = 64;
    done = std::min(bytes, -static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst)) & (kLine - 1));
    std::memcpy(dst, src, static_cast<size_t>(done));
    for (; done + kLine <= bytes; done += kLine) {
        const __m128i* from = reinterpret_cast<const __m128i*>(src + done);
        __m128i* to = reinterpret_cast<__m128i*>(dst + done);
        const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), c = _mm_loadu_si128(from + 2),
                      d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
#endif
    std::memcpy(dst + done, src + done, static_cast<size_t>(bytes - done));
}

// Stores past the caches become visible before those that follow; nothing else orders them.
inline void settle() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace mc
