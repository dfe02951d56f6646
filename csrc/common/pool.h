// Threads of the library: a loop whose iterations are handed out one by one to a few persistent workers.
#pragma once

#include <cstdint>

namespace mc {

// The threads that a call may use: `asked`, or if that is 0 the first number in OMP_NUM_THREADS, or one a processor.
int default_threads(int asked);

// body(context, i) for every i in [0, n_tasks), on at most n_threads threads, the caller's among them. Returns when all
// are done. `body` must not throw and must not call parallel_for, unless by with_team (team.h).
void parallel_for(int64_t n_tasks, int n_threads, void (*body)(void*, int64_t), void* context) noexcept;

template <class Body>
void parallel_for(int64_t n_tasks, int n_threads, Body& body) noexcept {
    parallel_for(n_tasks, n_threads, [](void* b, int64_t i) { (*static_cast<Body*>(b))(i); }, &body);
}

}  // namespace mc
