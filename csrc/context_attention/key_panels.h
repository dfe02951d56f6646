// Keys, turned, and values of one sequence as panels of matrix products (matmul.h), in the order of a timeline.
//
// A head's keys are rows of the W of scores: panels of kPanel entries, a row's elements lie as a turned row's (attend.h). Its
// values are the transposed W of the output: kPanel dimensions a panel, one step an entry (kF32) or two (kBF16), so that any
// run of entries that begins at a multiple of kPanel is a panel of its own. What fills up the last panels is zero.
#pragma once

#include "attend.h"
#include "check.h"
#include "matmul.h"
#include "phases.h"
#include "scratch.h"
#include "timeline.h"

namespace mc {

class KeyPanels {
public:
    // Room for `heads` heads of `entries` entries. type: of the products.
    KeyPanels(const mc_context_attention_args& a, const Attention& x, const AttendOps& ops, int type, int64_t heads,
              int64_t entries);

    static int64_t head_bytes(const Attention& x, int type, int64_t entries);
    int64_t scratch_floats(const Phases* phases) const;

    // Entries [block * kBlock, + kBlock) of the timeline of sequence b, for KV heads [first, first + count): numbered from 0
    // here. phases: NULL where nothing turns.
    void pack(const Timeline& timeline, int64_t b, int64_t block, int64_t first, int64_t count, const Phases* phases,
              float* scratch);

    const char* keys(int64_t head, int64_t entry) const {
        return data_.get() + head * head_bytes_ + entry / kPanel * panel_bytes(type_, x_.row.padded);
    }
    const char* values(int64_t head, int64_t dim, int64_t entry) const {
        return data_.get() + head * head_bytes_ + keys_bytes_ + dim / kPanel * value_bytes_ +
               entry * kPanel * element_bytes();
    }

private:
    int64_t element_bytes() const { return type_ == kBF16 ? 2 : 4; }
    void pack_keys(const Timeline& timeline, const char* k, int64_t first, int64_t n, const float* phase,
                   float* scratch, char* out) const;
    void pack_values(const Timeline& timeline, const char* v, int64_t head, int64_t first, int64_t n, float* scratch);

    const mc_context_attention_args& a_;
    const Attention& x_;
    const AttendOps& ops_;
    const int type_;
    const RowShape plain_;  // of a row of values
    int64_t keys_bytes_, value_bytes_, head_bytes_;
    Scratch<char> data_;
};

}  // namespace mc
