// A wait for another thread that takes microseconds.
#pragma once

#include <sched.h>

namespace mc {

constexpr int kSpins = 20000;

// To be called in a loop with the number of times before: spins, and after a while gives way, since the other thread may
// need this processor.
inline void wait_a_moment(int times) {
    if (times >= kSpins) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // as long as a pause; `yield` waits for nothing
#endif
}

}  // namespace mc
