// One of the team's threads leads: it runs the call, and the others look out for its jobs. Who finds one takes its
// iterations one by one, as the leader does. The caller leads, whose memory is at hand (prefills that were led by turns took
// a fifth longer), or after a moment whoever has come: a runner need not give the caller a task.
//
// A helper reads a job only between adding itself to `helpers_` and taking itself off, and only if the job is still open
// then; the leader closes a job and waits until nobody is in it before it writes the next. Both look at what the other
// writes after they have written themselves (in one order of all), so that one of them sees the other.
#include "team.h"

#include <atomic>
#include <exception>

#include "pool.h"
#include "wait.h"

namespace mc {
namespace {

class Team;
thread_local Team *led_here = nullptr, *called_here = nullptr;

class Team {
public:
    Team(void (*body)(void*), void* context) : lead_body_(body), lead_context_(context) {}

    void join() noexcept {
        for (int times = 0; called_here != this && times < kSpins / 10 && !led_.load(std::memory_order_relaxed); ++times) {
            wait_a_moment(times);
        }
        led_.exchange(true) ? help() : lead();
    }

    void run(int64_t n_tasks, int n_threads, void (*body)(void*, int64_t), void* context) noexcept {
        n_tasks_ = n_tasks;
        body_ = body;
        context_ = context;
        next_.store(0, std::memory_order_relaxed);
        wanted_.store(n_threads - 1, std::memory_order_relaxed);
        const int64_t job = phase_.load(std::memory_order_relaxed) + 1;
        phase_.store(job);
        work();
        phase_.store(job + 1);
        for (int times = 0; helpers_.load() > 0; ++times) wait_a_moment(times);
    }

    void rethrow() const {
        if (thrown_) std::rethrow_exception(thrown_);
    }

private:
    static constexpr int64_t kOver = -1;

    void lead() noexcept;

    void help() noexcept {
        const int number = numbers_.fetch_add(1, std::memory_order_relaxed);
        int64_t done = 0;  // or for others
        for (int times = 0;; ++times) {
            const int64_t job = phase_.load(std::memory_order_acquire);
            if (job == kOver) return;
            if (job % 2 == 0 || job == done) {
                wait_a_moment(times);
                continue;
            }
            if (number >= wanted_.load(std::memory_order_relaxed)) {  // of this job, or a later one: both may go without
                done = job;
                continue;
            }
            helpers_.fetch_add(1);
            if (phase_.load() == job) {
                work();
                done = job;
                times = 0;
            }
            helpers_.fetch_sub(1, std::memory_order_release);
        }
    }

    void work() noexcept {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;) body_(context_, i);
    }

    void (*const lead_body_)(void*);
    void* const lead_context_;
    std::exception_ptr thrown_;
    std::atomic<bool> led_{false};
    std::atomic<int> numbers_{0};  // of helpers
    // Of the present job.
    int64_t n_tasks_ = 0;
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    // Odd: there is a job; even: there is none.
    alignas(64) std::atomic<int64_t> phase_{0};
    std::atomic<int> wanted_{0};  // helpers of the job, at most
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int64_t> helpers_{0};
};

void Team::lead() noexcept {
    led_here = this;
    try {
        lead_body_(lead_context_);
    } catch (...) {
        thrown_ = std::current_exception();
    }
    led_here = nullptr;
    phase_.store(kOver);
}

}  // namespace

void with_team(int n_threads, void (*body)(void*), void* context) {
    if (n_threads <= 1 || led_here) return body(context);
    Team team(body, context);
    auto join = [&](int64_t) { team.join(); };
    called_here = &team;
    parallel_for(n_threads, n_threads, join);
    called_here = nullptr;
    team.rethrow();
}

bool leads_team() noexcept { return led_here != nullptr; }

bool run_on_team(int64_t n_tasks, int n_threads, void (*body)(void*, int64_t), void* context) noexcept {
    if (!led_here) return false;
    led_here->run(n_tasks, n_threads, body, context);
    return true;
}

}  // namespace mc
