// Errors inside the library are exceptions; `guarded` turns them into a status and a text at the ABI.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "mc_kernels.h"

namespace mc {

struct Error : std::runtime_error {
    int32_t status;
    Error(int32_t status_, const std::string& text) : std::runtime_error(text), status(status_) {}
};

void set_last_error(const char* text) noexcept;

[[noreturn]] inline void invalid(const std::string& text) { throw Error(MC_INVALID_ARGUMENT, text); }

template <class Body>
int32_t guarded(Body&& body) noexcept {
    try {
        body();
        return MC_OK;
    } catch (const Error& e) {
        set_last_error(e.what());
        return e.status;
    } catch (const std::bad_alloc&) {
    } catch (const std::length_error&) {  // of a vector: more than there can be
    }
    set_last_error("out of memory: no scratch for the call; nothing was written");
    return MC_OUT_OF_MEMORY;
}

}  // namespace mc
