// Steps that follow each other, the items of each shared by whatever threads are there.
//
// Every thread calls `work` once, from the body of one parallel_for. A step's items are divided into one run of successive
// ones a thread: a thread takes those of its own run in order, so that what they read is a stream, and then what is left of
// the others'. A step begins when all items of the one before are done. A thread waits only for items that another is
// working on: one that never comes, or late, holds nobody up. The wait spins, since steps are short, and gives way after a
// while.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "wait.h"

namespace mc {

class Stages {
public:
    Stages(const std::vector<int64_t>& items, int64_t threads)
        : threads_(threads), items_(items), done_(items.size()), runs_(items.size() * static_cast<size_t>(threads)) {
        for (size_t s = 0; s < items.size(); ++s) {
            for (int64_t t = 0; t < threads; ++t) run(s, t).next.store(begin(s, t), std::memory_order_relaxed);
        }
    }

    // body(stage, item), which must not throw. thread: below the number of threads, another for each caller.
    template <class Body>
    void work(int64_t thread, Body&& body) noexcept {
        for (size_t s = 0; s < items_.size(); ++s) {
            std::atomic<int64_t>& done = done_[s].count;
            for (int64_t n = 0; n < threads_; ++n) {
                const int64_t owner = (thread + n) % threads_, end = begin(s, owner + 1);
                std::atomic<int64_t>& next = run(s, owner).next;
                // Looked at first: a run that is done is only read.
                while (next.load(std::memory_order_relaxed) < end) {
                    const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
                    if (i >= end) break;
                    body(static_cast<int64_t>(s), i);
                    done.fetch_add(1, std::memory_order_release);
                }
            }
            for (int times = 0; done.load(std::memory_order_acquire) < items_[s]; ++times) wait_a_moment(times);
        }
    }

private:
    struct alignas(64) Done {
        std::atomic<int64_t> count{0};
    };
    struct alignas(64) Run {
        std::atomic<int64_t> next{0};
    };

    Run& run(size_t stage, int64_t thread) {
        return runs_[stage * static_cast<size_t>(threads_) + static_cast<size_t>(thread)];
    }
    int64_t begin(size_t stage, int64_t thread) const { return thread * items_[stage] / threads_; }

    const int64_t threads_;
    const std::vector<int64_t> items_;
    std::vector<Done> done_;
    std::vector<Run> runs_;
};

}  // namespace mc
