// Steps that follow each other, the items of each shared by whatever threads are there.
//
// Every thread calls `work` once, from the body of one parallel_for. An item is taken by whoever comes first, and a step
// begins when all items of the one before are done. A thread waits only for items that another is working on: one that
// never comes, or late, holds nobody up. The wait spins, since steps are short, and gives way after a while.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace mc {

class Stages {
public:
    explicit Stages(const std::vector<int64_t>& items) : counts_(items.size()) {
        for (size_t s = 0; s < items.size(); ++s) counts_[s].items = items[s];
    }

    // body(stage, item), which must not throw.
    template <class Body>
    void work(Body&& body) noexcept {
        for (size_t s = 0; s < counts_.size(); ++s) {
            Count& count = counts_[s];
            for (int64_t i; (i = count.next.fetch_add(1, std::memory_order_relaxed)) < count.items;) {
                body(static_cast<int64_t>(s), i);
                count.done.fetch_add(1, std::memory_order_release);
            }
            for (int spins = 0; count.done.load(std::memory_order_acquire) < count.items; ++spins) {
                if (spins >= kSpins) sched_yield();
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        }
    }

private:
    static constexpr int kSpins = 2000;
    struct alignas(64) Count {
        std::atomic<int64_t> next{0}, done{0};
        int64_t items = 0;
    };
    std::vector<Count> counts_;
};

}  // namespace mc
