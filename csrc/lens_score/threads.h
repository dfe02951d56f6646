// The threads of a call: as many as a step is worth.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace mc {

struct Threads {
    static constexpr int64_t kWork = 1 << 20;      // multiply-adds that are worth waking a thread for
    static constexpr int64_t kTasksPerThread = 4;  // evens out threads that are slowed down

    int most;

    int worth(int64_t multiply_adds) const {
        return static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(multiply_adds / kWork, 1)));
    }

    // body(first, end) over parts of [0, n), each a multiple of `grain` but the last. It must not throw.
    template <class Body>
    void split(int64_t n, int64_t grain, int64_t multiply_adds, Body&& body) const {
        const int threads = worth(multiply_adds);
        const int64_t grains = (n + grain - 1) / grain;
        const int64_t tasks = threads == 1 ? 1 : std::min(grains, threads * kTasksPerThread);
        auto part = [&](int64_t i) { body(grains * i / tasks * grain, std::min(grains * (i + 1) / tasks * grain, n)); };
        parallel_for(tasks, threads, part);
    }
};

}  // namespace mc
