// Threads that stay together for a call of many short jobs: a decode step is a hundred and fifty of them, and each would
// otherwise have to gather its threads and send them away again, which takes longer than what lies between two jobs.
#pragma once

#include <cstdint>

namespace mc {

// body() once, on one of at most n_threads threads; all jobs of parallel_for within it are shared by these. What it throws is
// thrown here. Threads that come late or never are not waited for.
void with_team(int n_threads, void (*body)(void*), void* context);

template <class Body>
void with_team(int n_threads, Body&& body) {
    with_team(n_threads, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}

// Whether this thread leads a team: then less work is worth sharing, since its threads are awake.
bool leads_team() noexcept;

// A job of the team that this thread leads, as for parallel_for; false, and nothing done, where it leads none.
bool run_on_team(int64_t n_tasks, int n_threads, void (*body)(void*, int64_t), void* context) noexcept;

}  // namespace mc
