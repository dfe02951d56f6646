// Checks of the tensor views that come through the ABI: texts name the argument, what was expected and what came.
#pragma once

#include <initializer_list>
#include <string>

#include "error.h"
#include "rows.h"

namespace mc {

inline std::string shape_text(const mc_tensor& x) {
    std::string out = "[";
    for (int i = 0; i < x.ndim; ++i) out += (i ? ", " : "") + std::to_string(x.size[i]);
    return out + "]";
}

inline bool is_empty(const mc_tensor& x) {
    for (int i = 0; i < x.ndim; ++i) {
        if (x.size[i] == 0) return true;
    }
    return false;
}

// Floating dtype, `ndim` dimensions, no negative size or stride, last dimension contiguous, an address unless empty.
// fp8: MC_F8E4M3 is taken too.
inline void check_view(const char* name, const mc_tensor& x, int ndim, bool fp8 = false) {
    const std::string who = std::string(name) + ": ";
    if (x.ndim != ndim) {
        invalid(who + "expected " + std::to_string(ndim) + " dimensions, got " + std::to_string(x.ndim));
    }
    if (x.dtype != MC_F32 && x.dtype != MC_F16 && x.dtype != MC_BF16 && !(fp8 && x.dtype == MC_F8E4M3)) {
        throw Error(MC_INVALID_DTYPE, who + "expected dtype MC_F32, MC_F16 or MC_BF16" + (fp8 ? " or MC_F8E4M3" : "") +
                                          ", got " + std::to_string(x.dtype));
    }
    for (int i = 0; i < ndim; ++i) {
        if (x.size[i] < 0) invalid(who + "expected sizes >= 0, got shape " + shape_text(x));
        if (x.size[i] > 1 && x.stride[i] < 0) {
            invalid(who + "expected strides >= 0, got stride[" + std::to_string(i) +
                    "] = " + std::to_string(x.stride[i]));
        }
    }
    if (is_empty(x)) return;
    if (x.size[ndim - 1] > 1 && x.stride[ndim - 1] != 1) {
        invalid(who + "expected a contiguous last dimension, got stride " + std::to_string(x.stride[ndim - 1]));
    }
    if (!x.data) invalid(who + "expected an address, got NULL");
}

inline void check_dtype(const char* name, const mc_tensor& x, const char* like_name, const mc_tensor& like) {
    if (x.dtype != like.dtype) {
        throw Error(MC_INVALID_DTYPE, std::string(name) + ": expected dtype " + std::to_string(like.dtype) + " as " +
                                          like_name + ", got " + std::to_string(x.dtype));
    }
}

// A size of -1 takes anything.
inline void check_sizes(const char* name, const mc_tensor& x, std::initializer_list<int64_t> want) {
    std::string text;
    bool same = true;
    int i = 0;
    for (int64_t n : want) {
        text += (i ? ", " : "") + (n < 0 ? std::string("*") : std::to_string(n));
        same = same && (n < 0 || x.size[i] == n);
        ++i;
    }
    if (!same) invalid(std::string(name) + ": expected shape [" + text + "], got " + shape_text(x));
}

// Nested strides: each dimension's step clears all that the smaller ones reach. Others may name an element twice.
inline void check_no_overlap(const char* name, const mc_tensor& x) {
    if (is_empty(x)) return;
    bool used[MC_MAX_DIMS] = {};
    int64_t reach = 0;
    for (;;) {
        int next = -1;
        for (int i = 0; i < x.ndim; ++i) {
            if (x.size[i] > 1 && !used[i] && (next < 0 || x.stride[i] < x.stride[next])) next = i;
        }
        if (next < 0) return;
        if (x.stride[next] <= reach) {
            invalid(std::string(name) + ": expected a view without overlap, got stride[" + std::to_string(next) +
                    "] = " + std::to_string(x.stride[next]) + " where smaller strides reach " + std::to_string(reach));
        }
        used[next] = true;
        reach += x.stride[next] * (x.size[next] - 1);
    }
}

}  // namespace mc
