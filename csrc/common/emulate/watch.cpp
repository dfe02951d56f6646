// Bounds and races: see watch.h.
//
// Races. Of every two bytes of a view the last write and the last reads are kept, as (block, thread, how many barriers
// the block has passed). Two accesses, one of them a write, are ordered if one thread made both, if they are of one block
// with a barrier between, or if a barrier of the whole grid was between.
#include "watch.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../error.h"
#include "../rows.h"
#include "scheduler.h"

namespace mc::emulate {
namespace {

struct Region {
    std::string name;
    uintptr_t base = 0;
    int64_t element = 1;  // bytes
    int dims = 0;
    int64_t size[MC_MAX_DIMS] = {}, stride[MC_MAX_DIMS] = {};  // bytes, largest stride first
    bool nested = false;                                       // otherwise any byte below `reach` counts
    int64_t reach = 0;
    bool written = false, ordered = true;  // ordered: whether races are looked for
};

std::vector<Region> regions;

constexpr int kMany = -2, kNobody = -1;
struct Access {
    int64_t block = kNobody, epoch = 0;
    int thread = kNobody;
    int64_t grid = 0;
};
struct Shadow {
    Access write, reads;
};
std::unordered_map<uintptr_t, Shadow> shadows;

int64_t elements_inside(const Region& r, int64_t offset) {
    // Bytes from `offset` on to the end of the run of elements that it is in; 0: in none.
    if (offset < 0 || offset >= r.reach) return 0;
    if (!r.nested) return r.reach - offset;
    for (int d = 0; d < r.dims; ++d) {
        const int64_t i = offset / r.stride[d];
        if (r.stride[d] == r.element) return i < r.size[d] ? r.size[d] * r.element - offset : 0;
        if (i >= r.size[d]) return 0;
        offset -= i * r.stride[d];
    }
    return offset < r.element ? r.element - offset : 0;
}

std::string who(const char* what, size_t bytes) {
    return std::string(what) + " of " + std::to_string(bytes) + " bytes ";
}

// Bytes between an address and the region: 0 where it is in a gap of it.
int64_t distance(const Region& r, int64_t offset) {
    return offset < 0 ? -offset : std::max<int64_t>(offset - r.reach, 0);
}

const Region& region_of(const void* p, size_t bytes, bool writes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    const Region* nearest = nullptr;
    int64_t least = 0;
    for (const Region& r : regions) {
        if (writes && !r.written) continue;
        const int64_t offset = static_cast<int64_t>(address - r.base), far = distance(r, offset);
        if (elements_inside(r, offset) >= static_cast<int64_t>(bytes)) return r;
        if (!nearest || far < least) nearest = &r, least = far;
    }
    const std::string what = who(writes ? "write" : "read", bytes);
    if (!nearest) fail(what + "where nothing is to be " + (writes ? "written" : "read"));
    fail(what + "outside every view; nearest: byte " + std::to_string(static_cast<int64_t>(address - nearest->base)) +
         " from the start of " + nearest->name);
}

bool apart(const Access& a, const Access& now) {
    if (a.block == kNobody || a.grid != now.grid) return true;
    if (a.block != now.block) return false;
    return a.epoch != now.epoch || a.thread == now.thread;
}

}  // namespace

Watched::Watched() { regions.clear(); }
Watched::~Watched() { regions.clear(); }

void Watched::view(const char* name, const mc_tensor& x, bool written) {
    Region r;
    r.name = name;
    r.base = reinterpret_cast<uintptr_t>(x.data);
    r.element = x.dtype == MC_I32 ? 4 : x.dtype == MC_I64 ? 8 : dtype_bytes(x.dtype);
    r.written = written;
    r.nested = true;
    r.reach = r.element;
    std::vector<std::pair<int64_t, int64_t>> dims;
    for (int i = 0; i < x.ndim; ++i) {
        if (x.size[i] == 0) return;
        if (x.size[i] > 1) dims.push_back({x.stride[i] * r.element, x.size[i]});
        r.reach += (x.size[i] - 1) * x.stride[i] * r.element;
    }
    std::sort(dims.begin(), dims.end());
    int64_t below = 0;
    for (const auto& [stride, size] : dims) {
        r.nested = r.nested && stride > below;
        below += stride * (size - 1);
    }
    for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
        r.stride[r.dims] = d->first;
        r.size[r.dims++] = d->second;
    }
    regions.push_back(r);
}

void Watched::array(const char* name, const void* data, int64_t bytes, bool written) {
    if (!data || bytes <= 0) return;
    Region r;
    r.name = name;
    r.base = reinterpret_cast<uintptr_t>(data);
    r.reach = bytes;
    r.written = written;
    regions.push_back(r);
}

void Watched::shared_array(const char* name, const void* data, int64_t bytes) {
    array(name, data, bytes, true);
    if (data && bytes > 0) regions.back().ordered = false;
}

void forget_accesses() { shadows.clear(); }

void check_access(const void* p, size_t bytes, size_t alignment, bool writes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address % alignment) {
        fail(who(writes ? "write" : "read", bytes) + "at an address that is not a multiple of " +
             std::to_string(alignment));
    }
    const Region& r = region_of(p, bytes, writes);
    if (!r.ordered || !r.written) return;
    const Access now{static_cast<int64_t>(place().block.x), epoch(), static_cast<int>(place().thread.x), grid_epoch()};
    for (uintptr_t i = address / 2; i <= (address + bytes - 1) / 2; ++i) {
        Shadow& s = shadows[i];
        if (!apart(s.write, now) || (writes && !apart(s.reads, now))) {
            fail(who(writes ? "write" : "read", bytes) + "at byte " + std::to_string(address - r.base) + " of " +
                 r.name + " races with thread " +
                 std::to_string(apart(s.write, now) ? s.reads.thread : s.write.thread) + " of block " +
                 std::to_string(apart(s.write, now) ? s.reads.block : s.write.block));
        }
        if (writes) {
            s.write = now;
            s.reads = Access{};
        } else if (s.reads.grid != now.grid) {
            s.reads = now;
        } else if (s.reads.block == now.block && s.reads.epoch == now.epoch) {
            if (s.reads.thread != now.thread) s.reads.thread = kMany;
        } else if (s.reads.block == kNobody || s.reads.block == now.block) {
            s.reads = now;
        } else {
            s.reads.block = kMany;  // read by several blocks: only a write is wrong
        }
    }
}

void check_atomic(const void* p, size_t bytes) { region_of(p, bytes, true); }

}  // namespace mc::emulate
