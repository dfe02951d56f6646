// The thread's last error text, and the library's version.
#include "error.h"

#include <cstdio>

namespace mc {

// A fixed buffer: reporting that there is no memory must not need any.
static thread_local char last_error[1024] = "";

void set_last_error(const char* text) noexcept { std::snprintf(last_error, sizeof last_error, "%s", text); }

}  // namespace mc

extern "C" const char* mc_last_error(void) { return mc::last_error; }
extern "C" const char* mc_version(void) { return MC_VERSION; }
