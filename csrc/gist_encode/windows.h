// The net on a batch of windows, as steps of items: a step's items can be done in any order and by several threads, once
// all items of the step before are done.
//
// A batch passes through the layers in groups, whose activations stay in cache; pooled rows of all groups
// are projected back together, since a group alone has few of them for so many weights.
#pragma once

#include <vector>

#include "encode.h"
#include "isa.h"
#include "packed.h"
#include "scratch.h"

namespace mc {

// What all batches of a call share.
struct Encoding {
    const mc_gist_encode_args& args;
    const Packed& weights;
    const IsaLevel& level;
    const EncodeOps& ops;
    int64_t entries;            // rows of a window: K, and the class token
    std::vector<float> phases;  // [entries, head_dim]: cosines, sines

    Encoding(const mc_gist_encode_args& args, const Packed& weights, const IsaLevel& level);
    int64_t embeddings() const { return args.blocks.size[1]; }
    // Bytes of a group's activations per window.
    int64_t window_bytes() const;
};

// Memory for what one item needs on the way: of a thread, not of a batch.
class ItemScratch {
public:
    ItemScratch(const Encoding& e, int64_t group);

    Scratch<float> sum;                     // [2, embed], see Normalise
    Scratch<float> q, k, scores, attended;  // of a window and head
    Scratch<char> keys;                     // k in panels
    Scratch<float> gate_up;                 // [rows of a group, 2 panels]
    Scratch<float> s, p, pooled;            // of a window
    int64_t head_step, scores_step, keys_panel, s_step;
};

class Windows {
public:
    // For batches of at most `batch` windows, in groups of at most `group`. shared: by several threads.
    Windows(const Encoding& e, int64_t batch, int64_t group, bool shared);

    void begin_batch(int64_t first, int64_t count);
    void begin_group(int64_t first, int64_t count);  // of the batch; numbered from the call's first window

    // Steps of a group, then those of its batch.
    int group_steps() const { return 2 + kLayerSteps * static_cast<int>(e_.weights.net().layers) + 1; }
    int batch_steps() const { return 2; }
    int64_t group_items(int step) const;
    int64_t batch_items(int step) const;
    void group_item(int step, int64_t i, ItemScratch& s);
    void batch_item(int step, int64_t i);

private:
    enum LayerStep { kAttnNorm, kQkv, kAttend, kAttnOut, kFfnNorm, kGateUp, kDown, kLayerSteps };
    static constexpr int64_t kNormRows = 8;  // of an item

    void read(int64_t window, ItemScratch& s);
    void norm(int64_t i, const float* gain);
    void attend(int64_t i, ItemScratch& s);
    void gate_up(int64_t panel, const LayerWeights& w, ItemScratch& s);
    void pool(int64_t window, ItemScratch& s);
    void finish(int64_t row);
    // Of a panel and rows of `a`, without C.
    Product product(const Panels& w, int64_t panel, const char* a, int64_t a_step, int64_t rows) const;
    void multiply(const Panels& w, int64_t panel, const char* a, int64_t a_step, int64_t rows, float* c, int64_t c_step,
                  bool add) const;

    int64_t rows() const { return group_count_ * e_.entries; }
    int64_t gists() const { return batch_count_ * e_.weights.net().gists; }
    float* z_row(int64_t window, int64_t g) const;
    int64_t pooled_row(int64_t window, int64_t g) const;

    const Encoding& e_;
    const int type_;
    const bool fetches_, shared_;         // what is multiplied next: shared by threads it is a stream from memory
    int64_t h_step_, z_step_, qkv_step_;  // floats
    int64_t x_step_, a_step_, act_step_;  // bytes
    int64_t batch_first_ = 0, batch_count_ = 0, group_first_ = 0, group_count_ = 0;
    Scratch<float> h_, z_;      // residual stream; output before its norm
    Scratch<char> a_, pooled_;  // input of a product: normed or attended; pooled
    Scratch<char> wide_;        // in turn: the input, queries with keys and values, the gated units
};

}  // namespace mc
