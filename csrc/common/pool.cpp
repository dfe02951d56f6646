// The host's threads where it lends them (mc_set_parallel_runner), else the pool: one a process, made at its first use,
// its threads asleep on a condition variable between jobs.
//
// No OpenMP of our own: the host program usually has that runtime in use already (torch), and two teams of spinning
// threads on the same cores slow each other down. Workers here never spin.
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

#include "error.h"
#include "mc_kernels.h"
#include "team.h"

namespace mc {
namespace {

constexpr int kMaxThreads = 1024;

struct Runner {
    mc_parallel_runner run;
    void* host;
};

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

// Never destroyed: workers may wait on the pool while the process ends, calls in other threads may be in a runner.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<const Runner*> the_runner{nullptr};

// A child of fork() has none of the threads, ours or the host's, and perhaps a mutex that nobody will unlock.
bool forgets_at_fork() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        the_pool.store(nullptr);
        the_runner.store(nullptr);
    });
    return registered == 0;
}

Pool* pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found) return found;
    Pool* fresh = forgets_at_fork() ? new (std::nothrow) Pool : nullptr;
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
    const int threads = static_cast<int>(std::min<int64_t>(n_threads, n_tasks));
    if (threads > 1 && run_on_team(n_tasks, threads, body, context)) return;
    const Runner* lent = threads > 1 ? the_runner.load(std::memory_order_acquire) : nullptr;
    if (lent) return lent->run(lent->host, n_tasks, threads, body, context);
    Job job{n_tasks, body, context};
    Pool* shared = threads > 1 ? pool() : nullptr;
    if (shared) {
        shared->run(job, threads - 1);
    } else {
        job.work();
    }
}

}  // namespace mc

extern "C" int32_t mc_set_parallel_runner(mc_parallel_runner run, void* host) {
    return mc::guarded([&] {
        if (!mc::forgets_at_fork()) throw std::bad_alloc();
        mc::the_runner.store(run ? new mc::Runner{run, host} : nullptr, std::memory_order_release);
    });
}
