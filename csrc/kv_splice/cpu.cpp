// kv_splice on a CPU: survivors move and turn in place, inserted entries are written. The contract: mc_kernels.h.
//
// Floor. Of every entry that moves, a head's key and value are read once and written once, of every inserted one
// likewise: 4 * D * sizeof(dtype) bytes an entry, head and row (2 * D * sizeof(dtype) for a key that turns where it
// is). The floor is that sum over the machine's copy bandwidth, read plus write. The destination of an ordered move
// usually lies in lines that were read shortly before, so ordinary stores need no fetch of their own. Where source and
// destination lie apart (inserts, and moves in slots) the destination is cold, and is written past the caches. Arithmetic stays below it: 3 fused operations and one conversion each way for every 2
// elements of a key.
// Phases cost a sine and a cosine an entry and band, shared by all rows and heads of a task; an ordered splice at
// packed positions needs one phase a segment, because all of the segment turns by its shift.
//
// Parallel over lanes, (row, head, key or value): these share no memory, so threads need no order among them. Within
// one, the plan's segments run in their given order (see SplicePlan.segments: left-moving ones ascending, then
// right-moving ones descending), a segment in the direction of memmove, so that what is overwritten has been read.
#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "past_caches.h"
#include "pool.h"

namespace mc {
namespace {

constexpr int64_t kChunk = 32;   // entries whose phases are held at once: some kilobytes, in the first-level cache
constexpr int64_t kUniform = 8;  // as many neighbours with one delta share a phase
constexpr int64_t kThreadBytes = 1 << 19;  // traffic that is worth waking a thread for
constexpr int64_t kTasksPerThread = 4;     // evens out threads that are slowed down

class Task {
public:
    Task(const mc_kv_splice_args& a, const Cache& c, const Lanes& lanes, const RowOps& ops, double* turns,
         float* phases)
        : a_(a), c_(c), lanes_(lanes), ops_(ops), turns_(turns), phases_(phases) {
        phase_floats_ = phase_floats(a.half, a.interleaved);
    }

    // Lanes [first, end). Those of one plan go together and share phases.
    void run(int64_t first, int64_t end) {
        while (first < end) {
            const int64_t row = lanes_.row_of(first), plan = plan_of(row);
            const bool own_frequencies = a_.inv_freq_rows > 1;
            int64_t last_row = row + 1;
            while (!own_frequencies && lanes_.first_of(last_row) < end && plan_of(last_row) == plan) ++last_row;
            first_ = first;
            end_ = first = std::min(end, lanes_.first_of(last_row));
            if (plan < 0) continue;
            for (int64_t b = 0; rotates() && b < a_.half; ++b) {
                turns_[b] = a_.inv_freq[(own_frequencies ? row * a_.half : 0) + b] / 6.283185307179586476925;
            }
            splice(Plan(a_, plan));
        }
        settle();
    }

private:
    bool rotates() const { return a_.inv_freq_rows != 0; }
    int64_t plan_of(int64_t row) const { return a_.rows ? a_.rows[row] : 0; }

    // For the lanes that turn (keys, with rope), or for all others.
    template <class Body>
    void each(bool turning, Body&& body) const {
        for (int64_t i = first_; i < end_; ++i) {
            if ((rotates() && Lanes::is_key(i)) == turning) body(lanes_[i]);
        }
    }

    void splice(const Plan& plan) {
        for (int64_t i = 0; rotates() && i < plan.n_stays; ++i) turn(plan, Plan::at(plan.stays, i));
        for (int64_t i = 0; i < plan.n_segments; ++i) {
            const Segment s = Plan::at(plan.segments, i);
            each(false, [&](const Lane& lane) { copy(lane, s, s.destination <= s.source ? 1 : -1); });
            if (rotates()) turn(plan, s);
        }
        insert(plan);
    }

    // Keys of a segment, in strips that keep their bits, that turn by one delta, or by one each.
    void turn(const Plan& plan, const Segment& s) {
        const bool ascending = s.destination <= s.source, packed = !plan.positions && !plan.new_positions;
        const int dir = ascending ? 1 : -1;
        const int64_t source = s.source + (ascending ? 0 : s.count - 1), to = s.destination - s.source;
        auto delta = [&](int64_t i) { return plan.delta(source + dir * i, source + dir * i + to); };
        for (int64_t i = 0, n; i < s.count; i += n) {
            const int64_t d = delta(i);
            n = packed ? s.count : 1;
            while (i + n < s.count && delta(i + n) == d) ++n;
            const bool each_its_own = d != 0 && n < kUniform && i + n < s.count;
            if (each_its_own) {
                for (n = 0; n < kChunk && i + n < s.count && delta(i + n) != 0; ++n) {
                    ops_.phases(turns_, a_.half, delta(i + n), 1.0, a_.interleaved, phases_ + n * phase_floats_);
                }
            } else if (d != 0) {
                ops_.phases(turns_, a_.half, d, 1.0, a_.interleaved, phases_);
            }
            const int64_t first = source + dir * i;  // the strip's first entry in this direction
            each(true, [&](const Lane& lane) {
                if (d == 0) {
                    copy(lane, {ascending ? first : first - n + 1, (ascending ? first : first - n + 1) + to, n}, dir);
                } else {
                    rotate(lane, first, first + to, n, dir, each_its_own ? phase_floats_ : 0);
                }
            });
        }
    }

    // [count] entries one after the other in direction dir, split where a page ends: body(source, destination, n).
    template <class Body>
    void pieces(int64_t source, int64_t destination, int64_t count, int dir, Body&& body) const {
        while (count > 0) {
            const int64_t s = source % c_.block, d = destination % c_.block;
            const int64_t room = dir > 0 ? c_.block - std::max(s, d) : std::min(s, d) + 1;
            const int64_t n = std::min(count, room);
            body(source, destination, n);
            source += dir * n;
            destination += dir * n;
            count -= n;
        }
    }

    void copy(const Lane& lane, const Segment& s, int dir) const {
        if (s.source == s.destination) return;
        const int64_t ahead = dir > 0 ? 0 : s.count - 1, bytes = lane.entry_bytes();
        pieces(s.source + ahead, s.destination + ahead, s.count, dir, [&](int64_t from, int64_t to, int64_t n) {
            if (lane.slot_step == bytes) {
                const int64_t back = dir > 0 ? 0 : n - 1;
                move_piece(lane.at(to - back), lane.at(from - back), n * bytes);
            } else {
                copy_rows(lane.at(from), lane.at(to), n, dir * lane.slot_step, dir * lane.slot_step, bytes);
            }
        });
    }

    static void move_piece(char* dst, const char* src, int64_t bytes) {
        const auto to = reinterpret_cast<uintptr_t>(dst), from = reinterpret_cast<uintptr_t>(src);
        const auto apart = static_cast<int64_t>(to > from ? to - from : from - to);
        if (apart < bytes) {
            std::memmove(dst, src, static_cast<size_t>(bytes));
        } else {
            copy_past_caches(dst, src, bytes);
        }
    }

    // Rows that follow each other on both sides lie apart (`copy` moves its own) and are one piece.
    static void copy_rows(const char* src, char* dst, int64_t n, int64_t src_step, int64_t dst_step, int64_t bytes) {
        if (src_step == bytes && dst_step == bytes) {
            copy_past_caches(dst, src, n * bytes);
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            std::memcpy(dst + i * dst_step, src + i * src_step, static_cast<size_t>(bytes));
        }
    }

    void rotate(const Lane& lane, int64_t source, int64_t destination, int64_t count, int dir,
                int64_t phase_step) const {
        const float* phase = phases_;
        const int64_t step = dir * lane.slot_step, head = lane.row_bytes();
        pieces(source, destination, count, dir, [&](int64_t from, int64_t to, int64_t n) {
            rotate_rows({lane.at(from), lane.at(to), n, step, step, phase, phase_step, a_.half, rest(), 1.0f,
                         lane.heads, head, head});
            phase += n * phase_step;
        });
    }

    int64_t rest() const { return c_.dim - 2 * a_.half; }
    void rotate_rows(const RotateRows& run) const { ops_.rotate[c_.dtype][a_.interleaved ? 1 : 0](run); }

    void insert(const Plan& plan) {
        for (int64_t j = 0, n; j < plan.n_inserts; j += n) {
            const int64_t slot = plan.insert_slots[j];
            const int64_t most = std::min({plan.n_inserts - j, kChunk, c_.block - slot % c_.block});
            for (n = 1; n < most && plan.insert_slots[j + n] == slot + n; ++n) {
            }
            each(false, [&](const Lane& lane) {
                for (int64_t h = 0; h < lane.heads; ++h) {
                    copy_rows(lane.fresh + j * lane.fresh_step + h * lane.fresh_head,
                              lane.at(slot) + h * lane.row_bytes(), n, lane.fresh_step, lane.slot_step,
                              lane.row_bytes());
                }
            });
            if (!rotates()) continue;
            for (int64_t i = 0; i < n; ++i) {
                ops_.phases(turns_, a_.half, plan.after(slot + i), a_.attention_scaling, a_.interleaved,
                            phases_ + i * phase_floats_);
            }
            const float scale = static_cast<float>(a_.attention_scaling);
            each(true, [&](const Lane& lane) {
                rotate_rows({lane.fresh + j * lane.fresh_step, lane.at(slot), n, lane.fresh_step, lane.slot_step,
                             phases_, phase_floats_, a_.half, rest(), scale, lane.heads, lane.fresh_head,
                             lane.row_bytes()});
            });
        }
    }

    const mc_kv_splice_args& a_;
    const Cache& c_;
    const Lanes& lanes_;
    const RowOps& ops_;
    double* turns_;  // [half] inv_freq / 2 pi of the rows at hand
    float* phases_;  // [kChunk, phase_floats_]
    int64_t phase_floats_ = 0, first_ = 0, end_ = 0;
};

// Bytes read and written, roughly: what decides on the number of threads.
int64_t traffic(const mc_kv_splice_args& a, const Cache& c) {
    int64_t entries = 0, most = 0;
    for (int64_t p = 0; p < a.n_plans; ++p) {
        const Plan plan(a, p);
        entries = plan.n_inserts;
        for (int64_t i = 0; i < plan.n_segments; ++i) entries += plan.segments[3 * i + 2];
        for (int64_t i = 0; a.inv_freq_rows && a.new_positions && i < plan.n_stays; ++i)
            entries += plan.stays[3 * i + 2];
        most = std::max(most, entries);
    }
    return most * c.layers * c.batch * c.heads * c.dim * c.bytes * 4;
}

void kv_splice(const mc_kv_splice_args& a, int n_threads) {
    const RowOps& ops = row_ops();
    const Cache c = check_kv_splice(a);
    const int64_t bytes = traffic(a, c);
    if (bytes == 0) return;
    const int64_t threads = std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(bytes / kThreadBytes, 1));
    const Lanes lanes(a, c, 2 * c.layers * c.batch >= threads);  // rather single heads than idle threads
    const int64_t n = lanes.count(), tasks = threads == 1 ? 1 : std::min(n, threads * kTasksPerThread);
    // Allocated before anything is written, so that a call that lacks memory leaves the cache as it was.
    const int64_t half = a.inv_freq_rows ? a.half : 0, per_task = kChunk * phase_floats(half, a.interleaved);
    std::vector<double> turns(static_cast<size_t>(tasks * half));
    std::vector<float> phases(static_cast<size_t>(tasks * per_task));
    auto body = [&](int64_t i) {
        Task task(a, c, lanes, ops, turns.data() + i * half, phases.data() + i * per_task);
        task.run(i * n / tasks, (i + 1) * n / tasks);
    };
    parallel_for(tasks, static_cast<int>(threads), body);
}

}  // namespace
}  // namespace mc

extern "C" int32_t mc_kv_splice_cpu(const mc_kv_splice_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        mc::kv_splice(*args, n_threads);
    });
}
