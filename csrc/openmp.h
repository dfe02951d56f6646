// The OpenMP runtime that another library of this process uses (torch's, in Python) runs the kernels too.
//
// A runtime's threads spin for a while after each parallel region. Two kinds of threads on the same cores, the runtime's
// and ours, wait for each other; within one runtime the next region finds the threads awake. The runtime is found in
// the running process: GOMP_parallel is the entry that GCC's code calls, and that of LLVM and Intel has it as well.
// Regions have as many threads as omp_set_num_threads said, not as few as a job may need: with fewer, GCC's runtime
// ends the others, and the next region of the host has to start them again.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "mc_kernels.h"

namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// mc_parallel_runner; host: GOMP_parallel. Inside another region it gets one thread, which does all.
void run_on_openmp(void* host, int64_t n_tasks, int32_t, void (*task)(void*, int64_t), void* context) {
    struct Region {
        int64_t n_tasks;
        void (*task)(void*, int64_t);
        void* context;
        std::atomic<int64_t> next;
    } region{n_tasks, task, context, {0}};
    const auto body = [](void* data) {
        Region& r = *static_cast<Region*>(data);
        for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.n_tasks;) r.task(r.context, i);
    };
    reinterpret_cast<GompParallel>(host)(body, &region, 0, 0);
}

// Kernels run on the OpenMP runtime of `user`, a shared library that is loaded. Returns the runtime's file;
// std::runtime_error with the reason if there is none, and nothing has changed.
std::string use_openmp_of(const std::string& user) {
    void* loaded = dlopen(user.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!loaded) throw std::runtime_error(user + " is not loaded");
    void* own = dlsym(loaded, "GOMP_parallel");  // of what it depends on; the handle is kept, and that with it
    if (!own) throw std::runtime_error(user + " depends on no OpenMP runtime with the entry GOMP_parallel");
    // What is visible to all (LD_PRELOAD) has precedence, as it had when `user` was loaded.
    void* global = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    void* parallel = global ? global : own;
    if (mc_set_parallel_runner(run_on_openmp, parallel) != MC_OK) throw std::runtime_error(mc_last_error());
    Dl_info where{};
    return dladdr(parallel, &where) && where.dli_fname ? where.dli_fname : "unknown file";
}

}  // namespace
