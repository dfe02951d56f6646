// gist_encode on a CPU: the net of mc_kernels.h. Windows go through the layers in one thread's cache, weights stream.
//
// Floor. A window costs 2 * K * (E Eg + layers * (4 Eg^2 + 3 Eg F)) operations at the rate of the matrix products
// (matmul.h), a call one read of the weights. Everything between two products works on rows that are in cache, and costs
// a few percent of them; attention within a window of 32 has 1% of the operations.
// - Many windows: threads take batches of them. A batch goes through the layers in groups whose activations stay in
//   cache; each group reads all weights.
// - Few windows (decoding: one): all threads work on all of them and share the weights by columns (stages.h).
// An element of the result is computed in the same way in either case, so that it depends on nothing but its window.
#include <algorithm>
#include <memory>
#include <utility>

#include "share.h"
#include "stages.h"
#include "windows.h"

namespace mc {
namespace {

// Of a group's activations: the most that a core's share of the caches holds. Rows share each read of the weights: with
// 1 MB of second-level cache, 2.5 MB ran 9% faster than 0.3 MB did there.
constexpr int64_t kGroupBytes = 5 << 19;
constexpr int64_t kMostBatch = 16;        // windows: enough rows for one read of the output projection
constexpr int64_t kBatchesPerThread = 4;  // evens out threads that are slowed down
constexpr int64_t kSharedRows = 512;      // of a group that all threads work on, where they are too few for batches
constexpr int64_t kSharedTileRows = 384;  // the same where products outrun memory, which one read of the weights spares
constexpr int64_t kThreadWork = 1 << 20;  // multiply-adds that are worth waking a thread for

int64_t multiply_adds(const Net& net, int64_t rows) {
    return rows * net.width * (net.embed + net.layers * (4 * net.width + 3 * net.ffn));
}

void share_windows(const Encoding& e, int64_t n, int threads) {
    Windows windows(e, n, n, true);
    windows.begin_batch(0, n);
    windows.begin_group(0, n);
    std::vector<int64_t> items;
    for (int s = 0; s < windows.group_steps(); ++s) items.push_back(windows.group_items(s));
    for (int s = 0; s < windows.batch_steps(); ++s) items.push_back(windows.batch_items(s));
    Stages stages(items, threads);
    std::vector<std::unique_ptr<ItemScratch>> scratch;
    for (int i = 0; i < threads; ++i) scratch.push_back(std::make_unique<ItemScratch>(e, n));
    const int group_steps = windows.group_steps();
    auto work = [&](int64_t thread) {
        stages.work(thread, [&](int64_t step, int64_t i) {
            if (step < group_steps) {
                windows.group_item(static_cast<int>(step), i, *scratch[static_cast<size_t>(thread)]);
            } else {
                windows.batch_item(static_cast<int>(step) - group_steps, i);
            }
        });
        if (e.level.matmul->finish) e.level.matmul->finish();
    };
    parallel_for(threads, threads, work);
}

void encode_batch(Windows& windows, ItemScratch& scratch, int64_t first, int64_t count, int64_t group) {
    windows.begin_batch(first, count);
    const int64_t groups = (count + group - 1) / group;  // of equal size
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * count / groups, end = (g + 1) * count / groups;
        windows.begin_group(first + begin, end - begin);
        for (int s = 0; s < windows.group_steps(); ++s) {
            for (int64_t i = 0; i < windows.group_items(s); ++i) windows.group_item(s, i, scratch);
        }
    }
    for (int s = 0; s < windows.batch_steps(); ++s) {
        for (int64_t i = 0; i < windows.batch_items(s); ++i) windows.batch_item(s, i);
    }
}

void split_windows(const Encoding& e, int64_t n, int threads) {
    const int64_t even = threads == 1 ? n : n / (threads * kBatchesPerThread);
    const int64_t batch = std::max<int64_t>(1, std::min(kMostBatch, even));
    const int64_t group = std::max<int64_t>(1, std::min(batch, kGroupBytes / e.window_bytes()));
    const int64_t batches = (n + batch - 1) / batch;
    const int64_t workers = std::min<int64_t>(threads, batches);
    std::vector<std::pair<Windows, ItemScratch>> memories;
    memories.reserve(static_cast<size_t>(workers));
    for (int64_t i = 0; i < workers; ++i) memories.emplace_back(Windows(e, batch, group, false), ItemScratch(e, group));
    share_items(batches, memories, *e.level.matmul, [&](int64_t b, std::pair<Windows, ItemScratch>& own) {
        encode_batch(own.first, own.second, b * batch, std::min(batch, n - b * batch), group);
    });
}

void check_there(const char* name, const void* p) {
    if (!p) invalid(std::string(name) + ": expected an address, got NULL");
}

void check_threads(int32_t n) {
    if (n < 0) invalid("n_threads: expected at least 0, got " + std::to_string(n));
}

int product_type(const mc_gist_encode_weights& w, int32_t blocks_dtype, const IsaLevel& level) {
    const bool both = w.w_in.dtype == MC_BF16 && blocks_dtype == MC_BF16;
    return both && level.matmul->multiply[kBF16] ? kBF16 : kF32;
}

void encode(const mc_gist_encode_args& a, const Packed& weights, int32_t n_threads, const IsaLevel& level) {
    if (!level.matmul->multiply[weights.type()]) {
        invalid(std::string("packed: expected weights for products that level ") + level.name + " has, got bf16");
    }
    const int64_t n = a.blocks.size[0];
    if (n == 0) return;
    const Encoding e(a, weights, level);
    const int64_t work = multiply_adds(weights.net(), n * e.entries) / kThreadWork;
    const int threads = static_cast<int>(std::min<int64_t>(default_threads(n_threads), std::max<int64_t>(work, 1)));
    const int64_t rows = n * e.entries;
    const bool few = n < kBatchesPerThread * threads && rows <= kSharedRows;
    if (threads > 1 && (few || (level.matmul->outruns_memory && rows <= kSharedTileRows))) {
        share_windows(e, n, threads);
    } else {
        split_windows(e, n, threads);
    }
}

}  // namespace
}  // namespace mc

extern "C" int32_t mc_gist_encode_packed_bytes(const mc_gist_encode_weights* weights, int32_t dtype, int64_t* bytes) {
    return mc::guarded([&] {
        mc::check_there("weights", weights);
        mc::check_there("bytes", bytes);
        const mc::Net net = mc::check_weights(*weights);
        *bytes = mc::Packed(net, mc::product_type(*weights, dtype, mc::isa_level()), nullptr).bytes();
    });
}

extern "C" int32_t mc_gist_encode_pack_cpu(const mc_gist_encode_weights* weights, int32_t dtype, void* packed,
                                           int64_t bytes, int32_t n_threads) {
    return mc::guarded([&] {
        mc::check_there("weights", weights);
        const mc::Net net = mc::check_weights(*weights);
        mc::check_threads(n_threads);
        const mc::Packed out(net, mc::product_type(*weights, dtype, mc::isa_level()), static_cast<char*>(packed));
        if (bytes != out.bytes()) {
            mc::invalid("bytes: expected " + std::to_string(out.bytes()) + ", got " + std::to_string(bytes));
        }
        if (!packed || reinterpret_cast<uintptr_t>(packed) % 64) {
            mc::invalid("packed: expected an address that is a multiple of 64");
        }
        out.pack(*weights, mc::default_threads(n_threads));
    });
}

extern "C" int32_t mc_gist_encode_cpu(const mc_gist_encode_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        mc::check_there("args", args);
        mc::check_threads(n_threads);
        const mc::IsaLevel& level = mc::isa_level();
        const mc::Packed packed = mc::Packed::open(args->packed, args->packed_bytes);
        mc::check_windows(*args, packed.net());
        mc::encode(*args, packed, n_threads, level);
    });
}
