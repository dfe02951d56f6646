// mc_refocus_cuda: checks, scratch, two launches. The kernels: kernel.cuh.
#include "../gist_pool/host.cuh"
#include "check.h"
#include "kernel.cuh"

namespace mc::cuda {
namespace {

// Parts of the workspace, each on 16 bytes.
class Parts {
public:
    explicit Parts(void* base) : base_(static_cast<char*>(base)) {}

    // Where there is no workspace yet only the sizes count.
    template <class T>
    T* take(int64_t n) {
        T* const at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
        return at;
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

struct Calls {
    RefocusCall plan{};
    ApplyCall apply{};
    int64_t workspace = 0, lanes = 0;
};

void set_scratch(Calls& calls, const Refocusing& x, int64_t block, int64_t entry_bytes, void* workspace) {
    Parts parts(workspace);
    RefocusCall& c = calls.plan;
    c.keys = parts.take<uint64_t>(x.slots);
    c.new_index = parts.take<int64_t>(x.slots);
    int32_t** const arrays[] = {&c.ranks, &c.rows,       &c.actions,  &c.freed,
                                &c.holes, &c.new_levels, &c.new_born, &c.new_slots};
    for (int32_t** array : arrays) *array = parts.take<int32_t>(x.slots);
    const int64_t groups = x.slots / block;
    c.pooled_levels = parts.take<int32_t>(groups);
    calls.apply.groups = narrow("k", groups);
    calls.apply.kept = parts.take<char>(calls.lanes * groups * entry_bytes);
    calls.apply.pooled_levels = c.pooled_levels;
    calls.workspace = parts.used();
}

void set_plan(RefocusCall& c, const mc_refocus_args& a) {
    c.levels = a.levels;
    c.born = a.born;
    c.index = a.index;
    c.slots = a.slots;
    c.pos = a.pos;
    c.state = a.state;
    c.bias = a.bias;
    c.counts = a.counts;
    c.pinned = a.pinned;
    c.store_keys = a.store_keys;
    c.store_rows = a.store_rows;
    c.scores = a.scores;
    c.edits = a.edits;
    c.inserted = a.inserted;
    c.moves = a.moves;
    c.children = a.children;
    c.wanted = a.wanted;
    c.min_gain = a.min_gain;
    c.spare = a.hysteresis - a.min_gain;
    c.gist_bias = a.gist_bias;
    c.budget = a.budget;
    c.cooldown = a.cooldown;
    c.max_edits = a.max_edits;
    c.capacity = narrow("k", a.k.size[2]);
    narrow("k", 3 * a.k.size[2]);
    c.block = narrow("block_size", a.block_size);
    c.n_levels = narrow("n_levels", a.n_levels);
    c.n_pinned = narrow("n_pinned", a.n_pinned);
    c.n_store = narrow("n_store", a.n_store);
    c.n_wanted = narrow("n_wanted", a.n_wanted);
}

void set_apply(ApplyCall& c, const mc_refocus_args& a, const Refocusing& x, bool packs) {
    for (int64_t i = 0; i < a.n_weights; ++i) c.weights[i] = weights_of(x.pooling[i], a.weights[i], packs);
    c.n_weights = static_cast<int32_t>(a.n_weights);
    c.heads = narrow("k", x.heads);
    c.k = static_cast<char*>(a.k.data);
    c.v = static_cast<char*>(a.v.data);
    c.k_store = static_cast<const char*>(a.k_store.data);
    c.v_store = static_cast<const char*>(a.v_store.data);
    byte_strides(a.k, 3, c.k_steps);
    byte_strides(a.v, 3, c.v_steps);
    byte_strides(a.k_store, 3, c.k_store_steps);
    byte_strides(a.v_store, 3, c.v_store_steps);
    c.state = a.state;
    c.inserted = a.inserted;
    c.moves = a.moves;
    c.children = a.children;
}

Calls calls_of(const mc_refocus_args& a, const Refocusing& x, bool packs, void* workspace) {
    Calls calls;
    calls.lanes = blocks_of(x.layers * x.heads);
    set_plan(calls.plan, a);
    set_apply(calls.apply, a, x, packs);
    set_scratch(calls, x, a.block_size, 2 * x.pooling[0].row_bytes(), workspace);
    return calls;
}

void watch(Watched& watched, const mc_refocus_args& a, const Refocusing& x, void* workspace, int64_t bytes) {
    const int64_t n = x.slots;
    watched.view("k", a.k, true);
    watched.view("v", a.v, true);
    watched.view("k_store", a.k_store, false);
    watched.view("v_store", a.v_store, false);
    for (int64_t i = 0; i < a.n_weights; ++i) watch_weights(watched, a.weights[i]);
    watched.array("levels", a.levels, 4 * n, true);
    watched.array("born", a.born, 4 * n, true);
    watched.array("index", a.index, 8 * n, true);
    watched.array("slots", a.slots, 8 * n, true);
    watched.array("pos", a.pos, 8 * n, true);
    watched.array("bias", a.bias, 4 * n, true);
    watched.array("state", a.state, 8 * kStateWords, true);
    watched.array("counts", a.counts, 8 * (a.n_levels + 1), false);
    watched.array("pinned", a.pinned, 16 * a.n_pinned, false);
    watched.array("store_keys", a.store_keys, 8 * a.n_store, false);
    watched.array("store_rows", a.store_rows, 4 * a.n_store, false);
    watched.array("scores", a.scores, 8 * n, false);
    watched.array("edits", a.edits, 12 * n, true);
    watched.array("inserted", a.inserted, 8 * n, true);
    watched.array("moves", a.moves, 8 * n, true);
    watched.array("children", a.children, 4 * n, true);
    watched.array("wanted", a.wanted, 8 * a.n_wanted, true);
    watched.array("workspace", workspace, bytes, true);
}

void refocus(const mc_refocus_args& a, void* workspace, int64_t workspace_bytes, void* stream) {
    const Refocusing x = check_refocus(a);
    const bool packs = packs_of(x.pooling[0], a.k, a.v) && rows_on_16(a.k_store) && rows_on_16(a.v_store);
    const Calls calls = calls_of(a, x, packs, workspace);
    check_workspace(workspace, workspace_bytes, calls.workspace);
    const int pack = packs ? 16 / static_cast<int>(dtype_bytes(x.pooling[0].dtype)) : 1;
    const int pool_threads = threads_of_a_block();
    const int64_t shared = shared_for(calls.apply.weights[0], pool_threads, pack, 0);
    Watched watched;
    watch(watched, a, x, workspace, calls.workspace);
    const int threads = block_threads(kPlanThreads), whole = threads > kWarp ? threads / kWarp * kWarp : threads;
    launch("refocus (plan)", refocus_plan, 1, whole, shared_bytes_of<uint32_t>(2 * kMostWarps), stream, calls.plan);
    if (calls.lanes == 0 || x.slots == 0) return;
    with_type(x.pooling[0].dtype, packs, [&](auto type, auto size) {
        launch("refocus (apply)", refocus_apply<decltype(type), decltype(size)::value>, calls.lanes, pool_threads,
               shared, stream, calls.apply);
    });
}

}  // namespace
}  // namespace mc::cuda

extern "C" int32_t mc_refocus_cuda_workspace(const mc_refocus_args* args, int64_t* bytes) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (!bytes) mc::invalid("bytes: expected an address, got NULL");
        *bytes = mc::cuda::calls_of(*args, mc::check_refocus(*args), false, nullptr).workspace;
    });
}

extern "C" int32_t mc_refocus_cuda(const mc_refocus_args* args, void* workspace, int64_t workspace_bytes,
                                   void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::refocus(*args, workspace, workspace_bytes, stream);
    });
}
