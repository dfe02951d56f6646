// Items shared by threads that each have memory of their own, and that multiply matrices.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "matmul.h"
#include "pool.h"

namespace mc {

// body(item, memory) for every item, which are taken by whoever is free, on as many threads as there are memories; then each
// thread's products are finished. `body` must not throw: what it needs is taken before.
template <class Memory, class Body>
void share_items(int64_t items, std::vector<Memory>& memories, const MatmulOps& matmul, const Body& body) {
    std::atomic<int64_t> next{0};
    auto thread = [&](int64_t i) {
        for (int64_t n; (n = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            body(n, memories[static_cast<size_t>(i)]);
        }
        if (matmul.finish) matmul.finish();
    };
    const auto threads = static_cast<int64_t>(memories.size());
    parallel_for(threads, static_cast<int>(threads), thread);
}

}  // namespace mc
