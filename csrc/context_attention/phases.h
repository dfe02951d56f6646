// The phases of a call: of its queries one by one, of its entries a block at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "attend.h"
#include "check.h"
#include "phase_table.h"

namespace mc {

class Phases {
public:
    // furthest: at least the position of every entry that is seen. even_first: order of entries' phases.
    Phases(const mc_context_attention_args& a, const Attention& x, const RowOps& row_ops, int64_t furthest,
           bool even_first)
        : row_ops_(row_ops),
          frequencies_{a.inv_freq, a.half, x.interleaved, x.row.width, even_first},
          width_(x.row.width) {
        if (furthest >> kMostBits == 0) table_ = phase_table(row_ops, frequencies_, furthest);
        turns_.resize(static_cast<size_t>(a.half));
        inv_freq_.assign(static_cast<size_t>(width_), 0.0f);
        for (int64_t i = 0; i < a.half; ++i) {
            turns_[static_cast<size_t>(i)] = a.inv_freq[i] / 6.283185307179586476925;
            for (int64_t j = 0; j < (x.interleaved ? 2 : 1); ++j) {
                inv_freq_[static_cast<size_t>(x.interleaved ? 2 * i + j : i)] = static_cast<float>(a.inv_freq[i]);
            }
        }
        if (even_first) put_even_first(inv_freq_.data(), width_);
        unturned_.assign(static_cast<size_t>(2 * width_), 0.0f);
        std::fill(unturned_.begin(), unturned_.begin() + width_, 1.0f);
    }

    // Floats of scratch that `entries` needs: where positions lie beyond the tables.
    int64_t scratch() const { return table_ ? 0 : kBlock * 2 * width_; }

    // As pairs lie.
    void query(int64_t position, double scale, float* out) const {
        Frequencies in_order = frequencies_;
        in_order.even_first = false;
        write_phase(row_ops_, in_order, turns_.data(), position, scale, out);
    }

    // out [count, 2 * width]. sigma: by slot relative to the block, or NULL.
    void entries(const AttendOps& ops, const float* sigma, const Entries& e, float* scratch, float* out) const {
        float spread[kBlock];
        for (int64_t i = 0; sigma && i < e.count; ++i) spread[i] = sigma[e.slot[i]];
        PhaseRows rows{nullptr,          nullptr, 0,  e.count, e.position, sigma ? spread : nullptr,
                       inv_freq_.data(), width_,  out};
        int64_t numbers[kBlock];
        if (table_) {
            rows.high = table_->high.get();
            rows.low = table_->low.get();
            rows.bits = table_->bits;
        } else {  // each entry's own phase in the place of a high part, none in that of the low
            for (int64_t i = 0; i < e.count; ++i) {
                numbers[i] = i;
                write_phase(row_ops_, frequencies_, turns_.data(), e.position[i], 1.0, scratch + i * 2 * width_);
            }
            rows.high = scratch;
            rows.low = unturned_.data();
            rows.position = numbers;
        }
        ops.phases(rows);
    }

private:
    const RowOps& row_ops_;
    const Frequencies frequencies_;
    const int64_t width_;
    std::shared_ptr<const PhaseTable> table_;  // none: positions lie beyond the tables
    std::vector<double> turns_;                // [half] inv_freq / 2 pi
    std::vector<float> inv_freq_, unturned_;   // [width] as phases lie; the phase of position 0
};

}  // namespace mc
