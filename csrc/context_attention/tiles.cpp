// context_attention on a CPU for many queries: tiles of queries over packed keys, two matrix products and a softmax.
//
// Floor. 4 * Hq * D operations a visible pair of query and key, at the rate of the matrix products (matmul.h). What is done
// for each entry (turning, packing) is shared by all queries, what is done for each pair beside the products (softmax) is
// some 15 to 20 vector operations a vector of pairs, next to D (bf16) or 2 D (f32) in the products.
// - Keys are taken in such an order that a query sees the first ones of them (timeline.h): what a tile cannot see is neither
//   read nor computed, and a mask is a number of columns.
// - All query heads of a KV head are rows of its tile, the heads of a query side by side.
// - Scores of a tile and a run of keys stay in the second-level cache; probabilities are written over them, in the
//   products' type, and multiply with the run's values at once (FlashAttention, Dao 2023; softmax in units of log 2).
// - Mass is summed in a second sweep over the scores, when a row's greatest and its total are known: they are computed
//   anew.
//
// Memory: keys and values in panels, of as many KV heads as kPanelBytes hold or one, and some hundred kilobytes a thread;
// where mass is wanted also a float for each tile and entry. A tile is one task: the result does not depend on the threads.
#include "tiles.h"

#include <cmath>
#include <memory>

#include "isa.h"
#include "key_panels.h"
#include "share.h"

namespace mc {
namespace {

// At most, or one query's heads: several tiles of the micro-kernels, of 14 rows, and of matrix tiles 32.
constexpr int64_t kTileRows = 84, kMatrixTileRows = 96;
constexpr int64_t kRunKeys = 512;  // a multiple of kPanel
constexpr int64_t kPanelBytes = 32 << 20;
constexpr int64_t kThreadWork = 1 << 20;  // multiply-adds that are worth waking a thread for
constexpr double kLn2 = 0.693147180559945309417, kLog2E = 1.44269504088896340736;
constexpr float kNothing = -__builtin_inff();

class Tiles {
public:
    Tiles(const mc_context_attention_args& a, const Attention& x, int n_threads)
        : a_(a),
          x_(x),
          level_(isa_level()),
          ops_(attend_ops(level_)),
          type_(product_type(x, level_)),
          group_(x.heads / x.kv_heads) {
        for (int64_t b = 0; b < x.batch; ++b) timelines_.emplace_back(a, x, b);
        int64_t work = 0, entries = 0, furthest = 0;
        for (int64_t b = 0; b < x.batch; ++b) {
            const Timeline& t = timelines_[static_cast<size_t>(b)];
            entries = std::max(entries, t.entries());
            furthest = std::max(furthest, t.furthest);
            for (const int64_t n : t.seen) work += n * x.heads * x.row.dims * 2;
        }
        threads_ = std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(work / kThreadWork, 1));
        const int64_t rows = type_ == kBF16 && level_.matmul->outruns_memory ? kMatrixTileRows : kTileRows;
        tile_queries_ = std::min(std::max<int64_t>(rows / group_, 1), x.queries);
        tiles_ = (x.queries + tile_queries_ - 1) / tile_queries_;
        for (int64_t i = 0; i < x.batch * x.queries; ++i) far_ = far_ || a.q_pos[i] >> kMostBits > 0;
        // Queries may lie far beyond all that there is to see.
        if (!far_) furthest = std::max(furthest, *std::max_element(a.q_pos, a.q_pos + x.batch * x.queries));
        scale_ = static_cast<float>(a.scale * kLog2E * (a.inv_freq ? a.attention_scaling * a.attention_scaling : 1.0));
        if (a.inv_freq) phases_ = std::make_unique<const Phases>(a, x, row_ops(), furthest, false);
        const int64_t most = kPanelBytes / std::max<int64_t>(KeyPanels::head_bytes(x, type_, entries), 1);
        heads_ = std::min(std::max<int64_t>(most, 1), x.kv_heads);
        panels_ = std::make_unique<KeyPanels>(a, x, ops_, type_, heads_, entries);
        if (a.mass) mass_ = Scratch<float>(heads_ * tiles_ * entries);
        scratch_.reserve(static_cast<size_t>(threads_));
        for (int64_t i = 0; i < threads_; ++i) scratch_.emplace_back(*this);
    }

    void run() {
        for (int64_t b = 0; b < x_.batch; ++b) {
            for (int64_t h = 0; h < x_.kv_heads; h += heads_) attend(b, h, std::min(heads_, x_.kv_heads - h));
        }
    }

private:
    // Of one thread.
    struct Work {
        int64_t q_step, p_step, out_step;        // bytes, floats, floats
        Scratch<char> q;                         // [rows, q_step], zeros behind a row
        Scratch<float> p, out, top, total, row;  // [rows, p_step], [rows, out_step]; row: of a few queries or keys
        Scratch<int64_t> seen;                   // [queries of a tile]

        explicit Work(const Tiles& t)
            : q_step(product_row_bytes(t.type_, t.x_.row.padded)),
              p_step(product_row_bytes(kF32, kRunKeys) / 4),
              out_step(whole_panels(t.x_.row.dims)) {
            const int64_t rows = t.tile_queries_ * t.group_, phases = t.phases_ ? t.phases_->scratch() : 0;
            q = Scratch<char>(rows * q_step);
            std::fill(q.get(), q.get() + rows * q_step, 0);
            p = Scratch<float>(rows * p_step);
            out = Scratch<float>(rows * out_step);
            top = Scratch<float>(rows);
            total = Scratch<float>(rows);
            seen = Scratch<int64_t>(t.tile_queries_);
            const int64_t turned = kBlock * (2 * t.x_.row.width + t.x_.row.padded) + phases;
            row = Scratch<float>(std::max(turned, t.panels_->scratch_floats(t.phases_.get())));
        }
    };

    // body(item, work) for every item, on all threads.
    template <class Body>
    void share(int64_t items, const Body& body) {
        share_items(items, scratch_, *level_.matmul, body);
    }

    // KV heads [first, first + count) of sequence b.
    void attend(int64_t b, int64_t first, int64_t count) {
        const Timeline& timeline = timelines_[static_cast<size_t>(b)];
        share((timeline.entries() + kBlock - 1) / kBlock, [&](int64_t block, Work& w) {
            panels_->pack(timeline, b, block, first, count, phases_.get(), w.row.get());
        });
        // Of a causal prefill the last tile has most to do: threads end together when it comes first.
        share(count * tiles_, [&](int64_t i, Work& w) {
            const int64_t head = i / tiles_, tile = tiles_ - 1 - i % tiles_;
            attend_tile(timeline, b, first, head, tile * tile_queries_, w);
            if (a_.mass) sum_tile(timeline, head, tile, w);
        });
        if (a_.mass) collect_mass(timeline, b, first, count);
    }

    // Queries from `begin` on and KV head first + head.
    void attend_tile(const Timeline& timeline, int64_t b, int64_t first, int64_t head, int64_t begin, Work& w) const {
        const int64_t n = std::min(tile_queries_, x_.queries - begin), rows = n * group_;
        const int64_t *seen = timeline.seen.data() + begin, end = *std::max_element(seen, seen + n);
        std::fill(w.top.get(), w.top.get() + rows, kNothing);
        std::fill(w.total.get(), w.total.get() + rows, 0.0f);
        if (end == 0) std::fill(w.out.get(), w.out.get() + rows * w.out_step, 0.0f);
        if (end > 0) load_queries(b, (first + head) * group_, begin, n, w);
        for (int64_t k = 0; k < end; k += kRunKeys) {
            const int64_t columns = std::min(kRunKeys, whole_panels(end - k));
            score(head, seen, k, columns, n, w);
            ScoreTile tile = score_tile(timeline, k, columns, n, w);
            tile.total = w.total.get();
            tile.out = w.out.get();
            tile.out_step = w.out_step;
            tile.dims = w.out_step;
            ops_.soften[type_](tile);
            for (int64_t d = 0; d < x_.row.dims; d += kPanel) {
                Product p{};
                p.a = reinterpret_cast<const char*>(w.p.get());
                p.a_step = w.p_step * 4;
                p.m = rows;
                p.w = panels_->values(head, d, k);
                p.w_step = kPanel * 4;
                p.steps = product_steps(type_, columns);
                p.c = w.out.get() + d;
                p.c_step = w.out_step;
                p.n = kPanel;
                p.add = k > 0;
                level_.matmul->multiply[type_](p);
            }
        }
        finish(b, (first + head) * group_, begin, n, w);
    }

    // Turned queries, scaled, to w.q.
    void load_queries(int64_t b, int64_t first, int64_t begin, int64_t n, Work& w) const {
        const int64_t padded = x_.row.padded, width = 2 * x_.row.width;
        float *phase = w.row.get(), *turned = phase + kBlock * width, *far = turned + kBlock * padded;
        for (int64_t t0 = 0; t0 < n; t0 += kBlock) {
            const int64_t some = std::min(kBlock, n - t0), *at = a_.q_pos + b * x_.queries + begin + t0;
            if (phases_ && far_) {
                for (int64_t t = 0; t < some; ++t) phases_->query(at[t], 1.0, phase + t * width);
            } else if (phases_) {
                Entries entries;
                entries.count = some;
                for (int64_t t = 0; t < some; ++t) entries.position[t] = std::max<int64_t>(at[t], 0);
                phases_->entries(ops_, nullptr, entries, far, phase);
            }
            for (int64_t h = 0; h < group_; ++h) {
                const char* base = static_cast<const char*>(a_.q.data) + b * x_.q_stride[0] +
                                   (first + h) * x_.q_stride[1] + (begin + t0) * x_.q_stride[2];
                ops_.turn[x_.dtype][x_.interleaved]({base, x_.q_stride[2], some, phase, 1.0f, turned, &x_.row});
                for (int64_t t = 0; t < some; ++t) {
                    ops_.store[type_](turned + t * padded, padded, scale_,
                                      w.q.get() + ((t0 + t) * group_ + h) * w.q_step);
                }
            }
        }
    }

    // Products with keys [k, k + columns), for each panel those of its first query that sees one, and of all after it.
    void score(int64_t head, const int64_t* seen, int64_t k, int64_t columns, int64_t n, Work& w) const {
        for (int64_t t = 0; t < n; ++t) w.seen.get()[t] = std::min(std::max<int64_t>(seen[t] - k, 0), columns);
        int64_t t = 0;
        for (int64_t c = 0; c < columns; c += kPanel) {
            while (t < n && w.seen.get()[t] <= c) ++t;
            Product p{};
            p.a = w.q.get() + t * group_ * w.q_step;
            p.a_step = w.q_step;
            p.m = (n - t) * group_;
            p.w = panels_->keys(head, k + c);
            p.w_step = kPanel * 4;
            p.steps = product_steps(type_, x_.row.padded);
            p.c = w.p.get() + t * group_ * w.p_step + c;
            p.c_step = w.p_step;
            p.n = kPanel;
            level_.matmul->multiply[type_](p);
        }
    }

    ScoreTile score_tile(const Timeline& timeline, int64_t k, int64_t columns, int64_t n, const Work& w) const {
        ScoreTile tile{};
        tile.p = w.p.get();
        tile.p_step = w.p_step;
        tile.rows = n * group_;
        tile.columns = columns;
        tile.heads = group_;
        tile.seen = w.seen.get();
        tile.bias = timeline.bias.empty() ? nullptr : timeline.bias.data() + k;
        tile.top = w.top.get();
        return tile;
    }

    // Out and lse; w.total becomes its reciprocal, 0 where nothing is seen. With lse in place of the two, whose last bit is
    // large where scores are, mass would have its error.
    void finish(int64_t b, int64_t first, int64_t begin, int64_t n, const Work& w) const {
        for (int64_t i = 0; i < n * group_; ++i) {
            const int64_t head = first + i % group_, t = begin + i / group_;
            const float total = w.total.get()[i];
            const bool blind = total == 0.0f;
            const double lse = w.top.get()[i] + std::log2(static_cast<double>(total));
            w.total.get()[i] = blind ? 0.0f : 1.0f / total;
            a_.lse[(b * x_.heads + head) * x_.queries + t] = blind ? kNothing : static_cast<float>(lse * kLn2);
            char* out =
                static_cast<char*>(a_.out.data) + b * x_.out_stride[0] + head * x_.out_stride[1] + t * x_.out_stride[2];
            ops_.store[x_.dtype](w.out.get() + i * w.out_step, x_.row.dims, w.total.get()[i], out);
        }
    }

    // What the tile that `w` has just attended gives each entry, to its own row of mass_.
    void sum_tile(const Timeline& timeline, int64_t head, int64_t tile, Work& w) const {
        const int64_t begin = tile * tile_queries_, n = std::min(tile_queries_, x_.queries - begin);
        const int64_t *seen = timeline.seen.data() + begin, end = *std::max_element(seen, seen + n);
        float* out = mass_.get() + (head * tiles_ + tile) * timeline.entries();
        std::fill(out, out + timeline.entries(), 0.0f);
        for (int64_t k = 0; k < end; k += kRunKeys) {
            const int64_t columns = std::min(kRunKeys, whole_panels(end - k));
            float sum[kRunKeys] = {};
            score(head, seen, k, columns, n, w);
            ScoreTile scores = score_tile(timeline, k, columns, n, w);
            scores.total = w.total.get();
            scores.out = sum;
            ops_.sum_rows(scores);
            std::copy(sum, sum + std::min(columns, timeline.entries() - k), out + k);
        }
    }

    // Adds the rows of mass_, in their order, to the slots' mass: of the first heads to nothing.
    void collect_mass(const Timeline& timeline, int64_t b, int64_t first, int64_t count) {
        const int64_t entries = timeline.entries();
        float* mass = a_.mass + b * x_.slots;
        if (first == 0) std::fill(mass, mass + x_.slots, 0.0f);
        share((entries + kBlock - 1) / kBlock, [&](int64_t block, Work&) {
            const int64_t begin = block * kBlock, n = std::min(kBlock, entries - begin);
            double sum[kBlock] = {};  // of many small terms
            for (int64_t i = 0; i < count * tiles_; ++i) {
                const float* row = mass_.get() + i * entries + begin;
                for (int64_t e = 0; e < n; ++e) sum[e] += row[e];
            }
            for (int64_t e = 0; e < n; ++e) {
                mass[timeline.slot[static_cast<size_t>(begin + e)]] += static_cast<float>(sum[e]);
            }
        });
    }

    const mc_context_attention_args& a_;
    const Attention& x_;
    const IsaLevel& level_;
    const AttendOps& ops_;
    const int type_;
    const int64_t group_;
    int64_t threads_, tile_queries_, tiles_, heads_;
    bool far_ = false;  // queries lie beyond the tables of phases
    float scale_;
    std::vector<Timeline> timelines_;
    std::unique_ptr<const Phases> phases_;  // none: nothing turns
    std::unique_ptr<KeyPanels> panels_;
    std::vector<Work> scratch_;
    Scratch<float> mass_;  // [heads, tiles, entries] of a sequence, where mass is wanted
};

}  // namespace

void attend_tiles(const mc_context_attention_args& a, const Attention& x, int n_threads) {
    Tiles(a, x, n_threads).run();
}

}  // namespace mc
