// The tables of phases and the store of those used last.
#include "phase_table.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace mc {
namespace {

constexpr int kLeastBits = 12, kLeastLow = 5, kMostHigh = 11;
constexpr size_t kKept = 4;
constexpr std::align_val_t kLine{64};

struct Kept {
    std::vector<double> inv_freq;
    bool interleaved, even_first;
    int bits;
    std::shared_ptr<const PhaseTable> table;

    bool is(const Frequencies& f, int n) const {
        return bits == n && interleaved == f.interleaved && even_first == f.even_first &&
               static_cast<int64_t>(inv_freq.size()) == f.half &&
               (f.half == 0 || !std::memcmp(inv_freq.data(), f.inv_freq, static_cast<size_t>(f.half) * sizeof(double)));
    }
};

// Most recently used first.
struct Store {
    std::mutex mutex;
    std::vector<Kept> kept;
};

// Never destroyed, and forgotten by a child of fork(): another thread may have held its mutex.
std::atomic<Store*> the_store{nullptr};

Store* store() {
    Store* found = the_store.load(std::memory_order_acquire);
    if (found) return found;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_store.store(nullptr); });
    if (registered != 0) return nullptr;
    Store* fresh = new Store;
    if (the_store.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
    return found;
}

std::shared_ptr<const PhaseTable> make(const RowOps& ops, const Frequencies& f, int n) {
    auto table = std::make_shared<PhaseTable>();
    // A short low table stays in the first-level cache, a short high one in the second.
    const int low = n <= 2 * kMostHigh ? std::max(kLeastLow, n - kMostHigh) : (n + 1) / 2;
    const int64_t n_low = int64_t{1} << low, n_high = int64_t{1} << (n - low);
    table->bits = low;
    table->low = Floats(n_low * 2 * f.width);
    table->high = Floats(n_high * 2 * f.width);
    std::vector<double> turns(static_cast<size_t>(f.half));
    for (int64_t b = 0; b < f.half; ++b) turns[static_cast<size_t>(b)] = f.inv_freq[b] / 6.283185307179586476925;
    for (int64_t i = 0; i < n_low; ++i) {
        write_phase(ops, f, turns.data(), i, 1.0, table->low.get() + i * 2 * f.width);
    }
    for (int64_t i = 0; i < n_high; ++i) {
        write_phase(ops, f, turns.data(), i << low, 1.0, table->high.get() + i * 2 * f.width);
    }
    return table;
}

}  // namespace

Floats::Floats(int64_t n)
    : data_(static_cast<float*>(::operator new[](static_cast<size_t>(n) * sizeof(float), kLine))) {}

void Floats::Free::operator()(float* p) const { ::operator delete[](p, kLine); }

void put_even_first(float* x, int64_t n) {
    for (const float* end = x + n; x != end; x += 32) {
        float lying[32];
        std::copy(x, x + 32, lying);
        for (int i = 0; i < 16; ++i) {
            x[i] = lying[2 * i];
            x[16 + i] = lying[2 * i + 1];
        }
    }
}

void write_phase(const RowOps& ops, const Frequencies& f, const double* turns, int64_t position, double scale,
                 float* out) {
    if (f.width == 0) return;  // nothing turns; there may be no `out`
    const int64_t used = f.interleaved ? 2 * f.half : f.half;
    ops.phases(turns, f.half, position, scale, f.interleaved, out);
    // Cosines, then sines, each to its padded place: from the end, the source is not overwritten.
    std::memmove(out + f.width, out + used, static_cast<size_t>(used) * sizeof(float));
    std::fill(out + used, out + f.width, 0.0f);
    std::fill(out + f.width + used, out + 2 * f.width, 0.0f);
    if (f.even_first) put_even_first(out, 2 * f.width);
}

std::shared_ptr<const PhaseTable> phase_table(const RowOps& ops, const Frequencies& f, int64_t most) {
    int n = kLeastBits;
    while (most >> n) ++n;
    Store* shared = store();
    if (shared) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        for (size_t i = 0; i < shared->kept.size(); ++i) {
            if (!shared->kept[i].is(f, n)) continue;
            std::rotate(shared->kept.begin(), shared->kept.begin() + static_cast<std::ptrdiff_t>(i),
                        shared->kept.begin() + static_cast<std::ptrdiff_t>(i) + 1);
            return shared->kept[0].table;
        }
    }
    // Made outside of the lock: two threads may both make it, which costs time and nothing else.
    Kept fresh{std::vector<double>(f.inv_freq, f.inv_freq + f.half), f.interleaved, f.even_first, n, make(ops, f, n)};
    std::shared_ptr<const PhaseTable> table = fresh.table;
    if (shared) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        if (shared->kept.size() == kKept) shared->kept.pop_back();
        shared->kept.insert(shared->kept.begin(), std::move(fresh));
    }
    return table;
}

}  // namespace mc
