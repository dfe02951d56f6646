// mc_gist_pool_cuda and mc_collapse_cuda: checks, sizes, launches. The kernels: kernel.cuh.
#include <algorithm>
#include <vector>

#include "check.h"
#include "host.cuh"
#include "kernel.cuh"
#include "put_words.cuh"

namespace mc::cuda {
namespace {

void pool(const mc_gist_pool_args& a, void* stream) {
    const Pooling x = check_gist_pool(a);
    const bool packs = packs_of(x, a.k, a.v);
    PoolCall c{};
    c.weights = weights_of(x, a.weights, packs);
    c.k = static_cast<const char*>(a.k.data);
    c.v = static_cast<const char*>(a.v.data);
    c.k_gist = static_cast<char*>(a.k_gist.data);
    c.v_gist = static_cast<char*>(a.v_gist.data);
    byte_strides(a.k, 4, c.k_steps);
    byte_strides(a.v, 4, c.v_steps);
    byte_strides(a.k_gist, 4, c.k_out);
    byte_strides(a.v_gist, 4, c.v_out);
    c.rows_per_layer = narrow("k", std::max<int64_t>(a.k.size[0] / x.layers, 1));
    c.heads = narrow("k", x.heads);
    c.pairs = narrow("k", a.k.size[2] * x.gists);
    c.groups = (c.pairs + kRows - 1) / kRows;
    const int threads = threads_of_a_block();
    const int64_t shared = shared_for(c.weights, threads, packs ? 16 / static_cast<int>(dtype_bytes(x.dtype)) : 1, 0);
    const int32_t blocks = blocks_of(a.k.size[0] * x.heads * c.groups);
    if (blocks == 0) return;
    Watched watched;
    watched.view("k", a.k, false);
    watched.view("v", a.v, false);
    watched.view("k_gist", a.k_gist, true);
    watched.view("v_gist", a.v_gist, true);
    watch_weights(watched, a.weights);
    with_type(x.dtype, packs, [&](auto type, auto pack) {
        launch("gist_pool", gist_pool<decltype(type), decltype(pack)::value>, blocks, threads, shared, stream, c);
    });
}

struct CollapsePlan {
    Pooling x;
    std::vector<int32_t> words;
    int64_t pairs, kept_bytes;  // of a lane
    int64_t lanes;

    int64_t words_bytes() const { return words_workspace(words.size()); }
    bool kept_far() const { return kept_bytes > kMostKept; }
    int64_t workspace() const { return words_bytes() + (kept_far() ? lanes * kept_bytes : 0); }
};

CollapsePlan plan_of(const mc_collapse_args& a) {
    CollapsePlan p{check_collapse(a), {}, 0, 0, 0};
    narrow("k", a.k.size[3]);
    narrow("children", a.n_blocks * std::max(p.x.count, p.x.gists) + 3 * a.n_segments);
    const auto add = [&](const int64_t* from, int64_t n) {
        for (int64_t i = 0; i < n; ++i) p.words.push_back(static_cast<int32_t>(from[i]));
    };
    add(a.children, a.n_blocks * p.x.count);
    add(a.gist_slots, a.n_blocks * p.x.gists);
    add(a.segments, 3 * a.n_segments);
    p.pairs = a.n_blocks * p.x.gists;
    p.kept_bytes = p.pairs * 2 * p.x.row_bytes();
    p.lanes = p.x.layers * a.k.size[1] * p.x.heads;
    return p;
}

void collapse_on(const mc_collapse_args& a, void* workspace, int64_t workspace_bytes, void* stream) {
    const CollapsePlan p = plan_of(a);
    const Pooling& x = p.x;
    check_workspace(workspace, workspace_bytes, p.workspace());
    const bool packs = packs_of(x, a.k, a.v);
    CollapseCall c{};
    c.weights = weights_of(x, a.weights, packs);
    c.k = static_cast<char*>(a.k.data);
    c.v = static_cast<char*>(a.v.data);
    byte_strides(a.k, 4, c.k_steps);
    byte_strides(a.v, 4, c.v_steps);
    c.batch = narrow("k", a.k.size[1]);
    c.heads = narrow("k", x.heads);
    c.pairs = narrow("children", p.pairs);
    narrow("children", p.pairs * 2 * x.dims);
    c.n_segments = narrow("segments", a.n_segments);
    c.gist_slots_at = static_cast<int32_t>(a.n_blocks * x.count);
    c.segments_at = static_cast<int32_t>(a.n_blocks * (x.count + x.gists));
    const int threads = threads_of_a_block();
    const int64_t shared = shared_for(c.weights, threads, packs ? 16 / static_cast<int>(dtype_bytes(x.dtype)) : 1,
                                      p.kept_far() ? 0 : p.kept_bytes);
    const int32_t blocks = blocks_of(p.lanes);
    if (blocks == 0 || p.words.empty()) return;
    Watched watched;
    watched.view("k", a.k, true);
    watched.view("v", a.v, true);
    watch_weights(watched, a.weights);
    watched.shared_array("workspace", workspace, p.workspace());
    if (p.kept_far()) c.kept = static_cast<char*>(workspace) + p.words_bytes();
    give_words(c.word, p.words, workspace, stream);
    with_type(x.dtype, packs, [&](auto type, auto pack) {
        launch("collapse", collapse<decltype(type), decltype(pack)::value>, blocks, threads, shared, stream, c);
    });
}

}  // namespace
}  // namespace mc::cuda

extern "C" int32_t mc_gist_pool_cuda(const mc_gist_pool_args* args, void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::pool(*args, stream);
    });
}

extern "C" int32_t mc_collapse_cuda_workspace(const mc_collapse_args* args, int64_t* bytes) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (!bytes) mc::invalid("bytes: expected an address, got NULL");
        *bytes = mc::cuda::plan_of(*args).workspace();
    });
}

extern "C" int32_t mc_collapse_cuda(const mc_collapse_args* args, void* workspace, int64_t workspace_bytes,
                                    void* stream) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        mc::cuda::collapse_on(*args, workspace, workspace_bytes, stream);
    });
}
