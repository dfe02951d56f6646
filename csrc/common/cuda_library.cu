// What libmc_kernels_cuda says of itself, and its threads' last error texts. Its names are its own, since a program may
// link to libmc_kernels too.
#include <cstdio>

#include "error.h"

#if !defined(MC_CUDA_ARCHITECTURES)
#define MC_CUDA_ARCHITECTURES "emulated"
#endif

namespace mc {

// A fixed buffer: reporting that there is no memory must not need any.
static thread_local char last_error[1024] = "";

void set_last_error(const char* text) noexcept { std::snprintf(last_error, sizeof last_error, "%s", text); }

}  // namespace mc

extern "C" const char* mc_cuda_last_error(void) { return mc::last_error; }
extern "C" const char* mc_cuda_version(void) { return MC_VERSION; }
extern "C" const char* mc_cuda_architectures(void) { return MC_CUDA_ARCHITECTURES; }
