// How what is read next of W is fetched.
//
// A single row of x reads W row by row, in the order of memory: that is the stream which the hardware's prefetchers know.
// Some keep more lines on their way than a core may ask for, and there nothing is fetched; others do not
// (streams_want_fetches). More rows of x share tiles of a few rows of W, side by side, which no prefetcher follows.
#pragma once

#include <cstdint>

#include "linear.h"

namespace mc {
namespace {

// A tile that lies at least this far ahead of the one that is multiplied is fetched, into the second-level cache. Half
// of it is too little, twice as much gains nothing.
constexpr int64_t kAhead = 8 << 10;

// Of a stream of tiles of W, `rows` rows that are `step` bytes apart: n_rows from `w` on, then those from `next` on.
class Ahead {
public:
    Ahead(const char* w, const char* next, int64_t n_rows, int64_t rows, int64_t step)
        : w_(w),
          next_(next),
          n_rows_(n_rows),
          step_(step),
          distance_(step > 0 ? (kAhead + rows * step - 1) / (rows * step) * rows : 0) {}

    // What is fetched while the tile at `row` is read: the order of memory again.
    const char* of(int64_t row) const {
        const int64_t then = row + distance_;
        return then < n_rows_ ? w_ + then * step_ : next_ + (then - n_rows_) * step_;
    }

private:
    const char *w_, *next_;
    int64_t n_rows_, step_, distance_;
};

template <bool kYes>
struct Fetches {
    static constexpr bool value = kYes;
};

// Returns where to go on.
template <int64_t kBytes>
inline const char* fetch(const char* next) {
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    return next + kBytes;
}

}  // namespace
}  // namespace mc
