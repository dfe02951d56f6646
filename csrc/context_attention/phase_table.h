// Phases of all positions from two small tables: R(p) = R(high part of p) R(low part of p), one complex product an
// entry and pair instead of a sine and a cosine. Tables are kept between calls: a model asks for the same ones in every
// layer and at every token.
#pragma once

#include <cstdint>
#include <memory>

#include "rows.h"

namespace mc {

// Memory that starts at a cache line; nothing is initialised.
class Floats {
public:
    Floats() = default;
    explicit Floats(int64_t n);
    float* get() const { return data_.get(); }

private:
    struct Free {
        void operator()(float* p) const;
    };
    std::unique_ptr<float[], Free> data_;
};

struct Frequencies {
    const double* inv_freq;  // [half]
    int64_t half;
    bool interleaved;
    int64_t width;    // of a padded phase
    bool even_first;  // of every 32 pairs the even ones come first, as a register of bf16 is widened; width: 32 n
};

// Puts n floats, a multiple of 32, in that order.
void put_even_first(float* x, int64_t n);

// Tables reach to positions below 2^kMostBits.
constexpr int kMostBits = 28;

// The phase of one position, padded; turns [half] = inv_freq / 2 pi. scale: as for RowOps::phases.
void write_phase(const RowOps& ops, const Frequencies& f, const double* turns, int64_t position, double scale,
                 float* out);

struct PhaseTable {
    int64_t bits;      // of the low part
    Floats high, low;  // [2^(n - bits), 2 * width], [2^bits, 2 * width]
};

// For positions of at most `most` < 2^kMostBits.
std::shared_ptr<const PhaseTable> phase_table(const RowOps& ops, const Frequencies& f, int64_t most);

}  // namespace mc
