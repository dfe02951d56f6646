// How what is read next of W is fetched.
#pragma once

#include <cstdint>

namespace mc {
namespace {

// In the order of memory, as the rows of a tile follow each other: hardware prefetchers like one stream best. To the
// second-level cache: the first-level one loses a larger tile before it is used. Returns where to go on.
template <int64_t kBytes>
inline const char* fetch(const char* next) {
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    return next + kBytes;
}

}  // namespace
}  // namespace mc
