// The pool: one a process, made at its first use, its threads asleep on a condition variable between jobs.
//
// Not OpenMP: the host program usually has that runtime in use already (torch), and two teams of spinning threads on
// the same cores slow each other down. Workers here never spin.
//
// One job at a time. Who finds the pool taken runs his job alone, which is what he would get from a machine whose cores
// are busy. A worker that wakes too late is not waited for: the job is withdrawn when its iterations are given out.
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace mc {
namespace {

constexpr int kMaxThreads = 1024;

struct Job {
    int64_t n_tasks;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) body(context, i);
    }
};

class Pool {
public:
    void run(Job& job, int helpers) {
        std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
        if (!mine) return job.work();
        grow(helpers);
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job;
            wanted_ = std::min(helpers, workers_);
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(state_);
        wanted_ = 0;
        done_.wait(lock, [&] { return working_ == 0; });
        job_ = nullptr;
    }

private:
    void grow(int helpers) {  // under in_use_
        try {
            for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::exception&) {  // no more threads to be had: those that there are will do
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [&] { return wanted_ > 0; });
            --wanted_;
            ++working_;
            Job* job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex in_use_;  // held by the caller whose job it is
    int workers_ = 0;    // under in_use_
    std::mutex state_;   // guards what follows
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int wanted_ = 0, working_ = 0;  // workers that may still join the job; that are in it
};

// Never destroyed: workers may wait on it while the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool* pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found) return found;
    // A child of fork() has none of the threads and perhaps a mutex that nobody will unlock: it forgets the pool.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    Pool* fresh = registered == 0 ? new (std::nothrow) Pool : nullptr;
    if (!fresh) return nullptr;
    if (the_pool.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
    return found;
}

}  // namespace

int default_threads(int asked) {
    if (asked > 0) return std::min(asked, kMaxThreads);
    const char* text = std::getenv("OMP_NUM_THREADS");
    const long from_environment = text ? std::strtol(text, nullptr, 10) : 0;
    if (from_environment > 0) return static_cast<int>(std::min<long>(from_environment, kMaxThreads));
    return std::max(1, std::min(static_cast<int>(std::thread::hardware_concurrency()), kMaxThreads));
}

void parallel_for(int64_t n_tasks, int n_threads, void (*body)(void*, int64_t), void* context) noexcept {
    Job job{n_tasks, body, context};
    const int helpers = static_cast<int>(std::min<int64_t>(n_threads, n_tasks)) - 1;
    Pool* shared = helpers > 0 ? pool() : nullptr;
    if (shared) {
        shared->run(job, helpers);
    } else {
        job.work();
    }
}

}  // namespace mc
