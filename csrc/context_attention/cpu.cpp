// context_attention on a CPU for few queries: one stream over keys and values (of many: tiles.cpp). The contract:
// mc_kernels.h.
//
// Floor. Every visible key and value is read once: 2 * Hkv * D * sizeof(dtype) bytes an entry, over the machine's read
// bandwidth. To stay near it, everything else must come from a core's own caches:
// - Phases depend on the entry alone. A block of kBlock entries gets them once, from two small tables (phase_table.h),
//   and all KV heads use them: tasks are runs of entries, not heads, so one KV head and one sequence are enough to
//   occupy all threads (flash-decoding, Dao et al. 2023).
// - A key turns once for all queries that its head serves, 4 operations for each pair of vectors next to 2 a query; it
//   goes into a strip of a few keys in the first-level cache, from which all queries read it.
// - Scores are summed a vector of keys at a time, so that the sum across a register costs 3 operations a score.
// - Where a level multiplies bf16, the usual heads of bf16 are multiplied so (pairs_impl.h; head_tiles_impl.h on matrix
//   tiles, since the vector products of those processors take twice the time of two of fp32). What is read next, keys and
//   values, is fetched evenly over all steps then: fetches in bursts wait for each other.
//
// Online softmax in units of log 2 (Milakov & Gimelshein 2018): scale, magnitude and log2 e are in the queries.
// Runs of entries do not depend on the number of threads, and their results are merged in order: nor does the result.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attend.h"
#include "check.h"
#include "isa.h"
#include "phases.h"
#include "pool.h"
#include "scratch.h"
#include "team.h"
#include "tiles.h"
#include "visible.h"

namespace mc {
namespace {

constexpr int64_t kRun = 128;              // entries of a run, at least
constexpr int64_t kMostRuns = 64;          // of a sequence: bounds the memory of partial results
constexpr int64_t kThreadBytes = 1 << 18;  // of keys and values that are worth waking a thread for
constexpr int64_t kTasksPerThread = 4;     // evens out threads that are slowed down
constexpr double kLn2 = 0.693147180559945309417;

int64_t blocks_of(int64_t slots) { return (slots + kBlock - 1) / kBlock; }

class Call {
public:
    Call(const mc_context_attention_args& a, const Attention& x, int n_threads)
        : a_(a),
          x_(x),
          row_ops_(*isa_level().rows),
          ops_(attend_ops(isa_level())),
          in_pairs_(ops_.attend_pairs && x_.rows >= ops_.least_rows && x_.dtype == kBF16 && rotates() &&
                    in_pairs(x_.row, x_.interleaved)),
          unit_rows_(in_pairs_ ? (x_.rows + ops_.query_unit - 1) / ops_.query_unit * ops_.query_unit : 0) {
        out_step_ = (x_.row.dims + kPad - 1) / kPad * kPad;
        run_ = std::max(kRun, blocks_of((x_.slots + kMostRuns - 1) / kMostRuns) * kBlock);
        runs_ = (x_.slots + run_ - 1) / run_;
        const int64_t bytes = 2 * x_.batch * x_.kv_heads * x_.slots * x_.row.dims * dtype_bytes(x_.dtype);
        const int64_t work = bytes * std::max<int64_t>(x_.rows / 4, 1);
        const int64_t worth = leads_team() ? kThreadBytes / 8 : kThreadBytes;
        threads_ = std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(work / worth, 1));
    }

    void run() {
        if (x_.batch == 0 || (x_.heads * x_.queries == 0 && !a_.mass)) return;
        if (x_.slots == 0 || x_.heads * x_.queries == 0) return write_nothing();
        prepare();
        const int64_t n = x_.batch * runs_, tasks = threads_ == 1 ? 1 : std::min(n, threads_ * kTasksPerThread);
        const Parts parts(*this);
        const Scratch<float> scratch(tasks * parts.total);  // allocated before anything is written
        auto attend = [&](int64_t i) {
            float* own = scratch.get() + i * parts.total;
            std::fill(own + parts.p_pairs, own + parts.add, 0.0f);
            for (int64_t r = i * n / tasks; r < (i + 1) * n / tasks; ++r) {
                attend_run(r / runs_, r % runs_, own, parts);
            }
        };
        parallel_for(tasks, static_cast<int>(threads_), attend);
        auto merge = [&](int64_t i) { merge_row(i / x_.heads, i % x_.heads); };
        parallel_for(x_.batch * x_.heads, merge_threads(), merge);
        if (!a_.mass) return;
        auto collect = [&](int64_t i) { collect_mass(i / blocks_of(x_.slots), i % blocks_of(x_.slots)); };
        parallel_for(x_.batch * blocks_of(x_.slots), static_cast<int>(threads_), collect);
    }

private:
    // Where a task's scratch has its parts, in floats.
    struct Parts {
        int64_t far, turned, p, p_pairs, add, total;

        explicit Parts(const Call& c) {
            const int64_t phases = kBlock * 2 * c.x_.row.width;
            far = phases;
            turned = far + (c.phases_ ? c.phases_->scratch() : 0);
            p = turned + kPad * c.x_.row.padded;
            p_pairs = p + (c.a_.mass ? 0 : c.x_.rows * kBlock);
            add = p_pairs + c.unit_rows_ * kBlock / 2;
            total = add + c.x_.queries * kBlock;
        }
    };

    bool rotates() const { return a_.inv_freq != nullptr; }
    int64_t all_rows() const { return x_.heads * x_.queries; }
    int merge_threads() const { return runs_ * all_rows() * x_.row.dims < (1 << 20) ? 1 : static_cast<int>(threads_); }

    void write_nothing() {
        const std::vector<float> zeros(static_cast<size_t>(x_.row.dims));
        std::fill(a_.lse, a_.lse + x_.batch * all_rows(), kNothing);
        for (int64_t i = 0; a_.mass && i < x_.batch * x_.slots; ++i) a_.mass[i] = 0.0f;
        for (int64_t i = 0; i < x_.batch * all_rows(); ++i) {
            ops_.store[x_.dtype](zeros.data(), x_.row.dims, 1.0f, out_row(i / all_rows(), i % all_rows()));
        }
    }

    char* out_row(int64_t b, int64_t i) const {
        return static_cast<char*>(a_.out.data) + b * x_.out_stride[0] + i / x_.queries * x_.out_stride[1] +
               i % x_.queries * x_.out_stride[2];
    }

    // What does not depend on the entries: turned queries, tables, room for partial results.
    void prepare() {
        q_ = Floats(x_.batch * all_rows() * x_.row.padded);
        q_pairs_ = Floats(x_.batch * x_.kv_heads * unit_rows_ * x_.row.dims / 2);
        partial_ = Floats(x_.batch * runs_ * all_rows() * out_step_);
        top_ = Floats(x_.batch * runs_ * all_rows());
        total_ = Floats(x_.batch * runs_ * all_rows());
        if (a_.mass) {
            p_ = Floats(x_.batch * blocks_of(x_.slots) * all_rows() * kBlock);
            block_top_ = Floats(x_.batch * blocks_of(x_.slots) * all_rows());
        }
        visible_ = std::make_unique<const Visible>(a_, x_);
        int64_t furthest = visible_->furthest();
        double scale = a_.scale * 1.44269504088896340736;
        if (rotates()) {
            // A position beyond the tables needs a look at what is there.
            if (furthest >> kMostBits) {
                furthest = 0;
                for (int64_t i = 0; i < x_.batch * x_.slots; ++i) furthest = std::max(furthest, a_.kv_pos[i]);
            }
            phases_ = std::make_unique<const Phases>(a_, x_, row_ops_, furthest, in_pairs_);
            scale *= a_.attention_scaling * a_.attention_scaling;
        }
        turn_queries(scale);
    }

    void turn_queries(double scale) {
        std::vector<float> phases(static_cast<size_t>(x_.queries * 2 * x_.row.width));
        for (int64_t b = 0; b < x_.batch; ++b) {
            for (int64_t t = 0; rotates() && t < x_.queries; ++t) {
                phases_->query(a_.q_pos[b * x_.queries + t], scale, phases.data() + t * 2 * x_.row.width);
            }
            for (int64_t h = 0; h < x_.heads; ++h) {
                const char* base = static_cast<const char*>(a_.q.data) + b * x_.q_stride[0] + h * x_.q_stride[1];
                float* out = q_.get() + (b * all_rows() + h * x_.queries) * x_.row.padded;
                ops_.turn[x_.dtype][x_.interleaved](
                    {base, x_.q_stride[2], x_.queries, phases.data(), static_cast<float>(scale), out, &x_.row});
            }
        }
        for (int64_t i = 0; in_pairs_ && i < x_.batch * x_.kv_heads; ++i) {
            ops_.pack_queries(q_.get() + i * x_.rows * x_.row.padded, x_.rows, x_.row.padded, x_.row.dims, q_pairs(i));
        }
    }

    // head: of all KV heads in the batch.
    uint16_t* q_pairs(int64_t head) const {
        return reinterpret_cast<uint16_t*>(q_pairs_.get()) + head * unit_rows_ * x_.row.dims;
    }

    void attend_run(int64_t b, int64_t run, float* scratch, const Parts& at) const {
        const int64_t rows = all_rows(), part = (b * runs_ + run) * rows;
        float *top = top_.get() + part, *total = total_.get() + part, *out = partial_.get() + part * out_step_;
        std::fill(top, top + rows, kNothing);
        std::fill(total, total + rows, 0.0f);
        std::fill(out, out + rows * out_step_, 0.0f);
        const char* k = static_cast<const char*>(a_.k.data) + b * x_.k_stride[0];
        const char* v = static_cast<const char*>(a_.v.data) + b * x_.v_stride[0];
        if (in_pairs_ && ops_.begin_pairs) ops_.begin_pairs();
        const int64_t first = run * run_ / kBlock, end = blocks_of(std::min((run + 1) * run_, x_.slots));
        for (int64_t block = first; block < end; ++block) {
            Entries entries;
            visible_->entries(b, block, entries);
            if (entries.count == 0) continue;
            const int64_t slot = block * kBlock, numbered = (b * blocks_of(x_.slots) + block) * rows;
            if (rotates()) {
                const float* sigma = a_.sigma ? a_.sigma + b * x_.slots + slot : nullptr;
                phases_->entries(ops_, sigma, entries, scratch + at.far, scratch);
            }
            const int64_t n_times = visible_->add(b, block, entries, scratch + at.add);
            for (int64_t h = 0; h < x_.kv_heads; ++h) {
                const bool more = h + 1 < x_.kv_heads;
                const int64_t next_head = more ? h + 1 : 0, next_slot = more ? slot : slot + kBlock;
                const bool none = !more && block + 1 == blocks_of(x_.slots);
                const int64_t row = h * x_.rows;
                HeadBlock work{};
                work.k = k + h * x_.k_stride[1] + slot * x_.k_stride[2];
                work.v = v + h * x_.v_stride[1] + slot * x_.v_stride[2];
                work.k_step = x_.k_stride[2];
                work.v_step = x_.v_stride[2];
                work.entries = &entries;
                work.phase = scratch;
                work.add = n_times ? scratch + at.add : nullptr;
                work.n_times = n_times;
                work.q = q_.get() + (b * rows + row) * x_.row.padded;
                work.q_pairs = in_pairs_ ? q_pairs(b * x_.kv_heads + h) : nullptr;
                work.rows = x_.rows;
                work.turned = scratch + at.turned;
                work.p = a_.mass ? p_.get() + (numbered + row) * kBlock : scratch + at.p;
                work.p_pairs = reinterpret_cast<uint16_t*>(scratch + at.p_pairs);
                work.top = top + row;
                work.total = total + row;
                work.out = out + row * out_step_;
                work.out_step = out_step_;
                work.next = none ? nullptr : k + next_head * x_.k_stride[1] + next_slot * x_.k_stride[2];
                work.next_v = none ? nullptr : v + next_head * x_.v_stride[1] + next_slot * x_.v_stride[2];
                work.next_step = x_.k_stride[2];
                work.shape = &x_.row;
                (in_pairs_ ? ops_.attend_pairs : ops_.attend[x_.dtype][x_.interleaved])(work);
            }
            if (a_.mass) std::copy(top, top + rows, block_top_.get() + numbered);
        }
        if (in_pairs_ && ops_.end_pairs) ops_.end_pairs();
    }

    // Out and lse of one head. Partial results of the first run become those of all runs.
    void merge_row(int64_t b, int64_t h) const {
        for (int64_t i = h * x_.queries; i < (h + 1) * x_.queries; ++i) {
            const int64_t part = b * runs_ * all_rows() + i, step = all_rows();
            float top = kNothing;
            for (int64_t r = 0; r < runs_; ++r) {
                const float x = top_.get()[part + r * step];
                top = top > x ? top : x;  // a NaN is in the total in any case
            }
            float* out = partial_.get() + part * out_step_;
            float total = 0.0f;
            for (int64_t r = 0; r < runs_; ++r) {
                const float here = top_.get()[part + r * step], *from = out + r * step * out_step_;
                const float weight = here == top ? 1.0f : std::exp2(here - top);  // also where both are -infinity
                total += weight * total_.get()[part + r * step];
                for (int64_t d = 0; d < x_.row.dims; ++d) out[d] = (r ? out[d] : 0.0f) + weight * from[d];
            }
            const bool blind = total == 0.0f;
            top_.get()[part] = top;
            total_.get()[part] = total;
            a_.lse[b * all_rows() + i] =
                blind ? kNothing : static_cast<float>((top + std::log2(static_cast<double>(total))) * kLn2);
            ops_.store[x_.dtype](out, x_.row.dims, blind ? 0.0f : 1.0f / total, out_row(b, i));
        }
    }

    void collect_mass(int64_t b, int64_t block) const {
        Entries entries;
        visible_->entries(b, block, entries);
        double sum[kBlock] = {};  // of many small terms
        const int64_t rows = all_rows(), numbered = (b * blocks_of(x_.slots) + block) * rows;
        for (int64_t i = 0; entries.count && i < rows; ++i) {
            const int64_t merged = b * runs_ * rows + i;
            const float here = block_top_.get()[numbered + i], top = top_.get()[merged], total = total_.get()[merged];
            if (total == 0.0f) continue;  // sees nothing
            const double weight = (here == top ? 1.0f : std::exp2(here - top)) / static_cast<double>(total);
            const float* p = p_.get() + (numbered + i) * kBlock;
            for (int64_t e = 0; e < entries.count; ++e) sum[e] += p[e] * weight;
        }
        float* mass = a_.mass + b * x_.slots + block * kBlock;
        std::fill(mass, mass + std::min(kBlock, x_.slots - block * kBlock), 0.0f);
        for (int64_t e = 0; e < entries.count; ++e) mass[entries.slot[e]] = static_cast<float>(sum[e]);
    }

    const mc_context_attention_args& a_;
    const Attention& x_;
    const RowOps& row_ops_;
    const AttendOps& ops_;
    const bool in_pairs_;
    const int64_t unit_rows_;  // of a KV head in whole units of packed queries
    int64_t out_step_, run_, runs_, threads_;
    std::unique_ptr<const Phases> phases_;  // none: nothing turns
    std::unique_ptr<const Visible> visible_;
    Floats q_, q_pairs_;                    // [B, Hq * T, padded]; of each KV head as pack_queries leaves it
    Floats partial_, top_, total_;          // [B, runs, Hq * T(, out_step)]
    Floats p_, block_top_;                  // [B, blocks, Hq * T(, kBlock)], where mass is wanted
};

}  // namespace
}  // namespace mc

extern "C" int32_t mc_context_attention_cpu(const mc_context_attention_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        const mc::Attention x = mc::check_context_attention(*args);
        const bool any = x.batch * x.heads * x.queries * x.slots > 0;
        if (any && mc::serves_tiles(x, args->mass != nullptr)) return mc::attend_tiles(*args, x, n_threads);
        mc::Call(*args, x, n_threads).run();
    });
}
