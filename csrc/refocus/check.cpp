// Checks of mc_refocus_cuda: all but what lies in device memory.
#include "check.h"

#include <cmath>
#include <iterator>

namespace mc {
namespace {

void check_between(const char* name, int64_t x, int64_t low, int64_t high) {
    if (x >= low && x <= high) return;
    invalid(std::string(name) + ": expected " + std::to_string(low) + ".." + std::to_string(high) + ", got " +
            std::to_string(x));
}

void check_count(const char* name, int64_t n) {
    if (n < 0) invalid(std::string(name) + ": expected at least 0, got " + std::to_string(n));
}

void check_array(const char* name, const void* p, int64_t n) {
    if (n && !p) invalid(std::string(name) + ": expected an array, got NULL");
}

void check_nats(const char* name, double x) {
    if (x >= 0 && x <= 1e9) return;  // false for NaN
    invalid(std::string(name) + ": expected nats between 0 and 1e9, got " + std::to_string(x));
}

// k or v of one sequence, as collapse's checks take them.
mc_tensor with_batch(const mc_tensor& x) {
    mc_tensor out = x;
    out.ndim = 5;
    for (int i = 4; i > 1; --i) {
        out.size[i] = x.size[i - 1];
        out.stride[i] = x.stride[i - 1];
    }
    out.size[1] = 1;
    out.stride[1] = x.stride[0];
    return out;
}

void check_store(const mc_refocus_args& a) {
    const int64_t* n = a.k.size;
    check_view("k_store", a.k_store, 4);
    check_view("v_store", a.v_store, 4);
    check_dtype("k_store", a.k_store, "k", a.k);
    check_dtype("v_store", a.v_store, "k", a.k);
    check_sizes("k_store", a.k_store, {n[0], n[1], -1, n[3]});
    check_sizes("v_store", a.v_store, {n[0], n[1], a.k_store.size[2], n[3]});
    const mc_tensor* const stores[2] = {&a.k_store, &a.v_store};
    for (const mc_tensor* store : stores) {
        if (!is_empty(*store) && !is_empty(a.k) && (store->data == a.k.data || store->data == a.v.data)) {
            invalid(std::string(store == stores[0] ? "k_store" : "v_store") +
                    ": expected memory apart from k and v, got the same address");
        }
    }
}

void check_arrays(const mc_refocus_args& a, int64_t slots) {
    check_count("n_levels", a.n_levels);
    check_count("n_pinned", a.n_pinned);
    check_count("n_store", a.n_store);
    check_count("n_wanted", a.n_wanted);
    const struct {
        const char* name;
        const void* data;
        int64_t n;
    } arrays[] = {
        {"state", a.state, 1},
        {"counts", a.counts, 1},
        {"levels", a.levels, slots},
        {"index", a.index, slots},
        {"born", a.born, slots},
        {"slots", a.slots, slots},
        {"pos", a.pos, slots},
        {"scores", a.scores, slots},
        {"pinned", a.pinned, a.n_pinned},
        {"store_keys", a.store_keys, a.n_store},
        {"store_rows", a.store_rows, a.n_store},
        {"edits", a.edits, slots},
        {"inserted", a.inserted, slots},
        {"moves", a.moves, slots},
        {"children", a.children, slots},
        {"wanted", a.wanted, a.n_wanted},
    };
    for (const auto& x : arrays) check_array(x.name, x.data, x.n);
}

void check_numbers(const mc_refocus_args& a, int64_t slots) {
    check_between("block_size", a.block_size, 2, int64_t{1} << 20);
    check_between("budget", a.budget, 0, slots);
    check_between("cooldown", a.cooldown, 0, int64_t{1} << 30);
    if (a.max_edits < -1) invalid("max_edits: expected at least 0, or -1 for any, got " + std::to_string(a.max_edits));
    check_nats("min_gain", a.min_gain);
    check_nats("hysteresis", a.hysteresis);
    if (!std::isfinite(a.gist_bias)) {
        invalid("gist_bias: expected a finite number, got " + std::to_string(a.gist_bias));
    }
}

}  // namespace

Refocusing check_refocus(const mc_refocus_args& a) {
    if (a.struct_size != sizeof(mc_refocus_args)) {
        invalid("struct_size: expected " + std::to_string(sizeof(mc_refocus_args)) + ", got " +
                std::to_string(a.struct_size) + " (another version of mc_kernels.h?)");
    }
    check_view("k", a.k, 4);
    check_view("v", a.v, 4);
    Refocusing out{};
    out.layers = a.k.size[0];
    out.heads = a.k.size[1];
    out.slots = a.k.size[2];
    out.dims = a.k.size[3];
    check_numbers(a, out.slots);
    check_between("n_weights", a.n_weights, 1, static_cast<int64_t>(std::size(out.pooling)));
    check_array("weights", a.weights, a.n_weights);
    for (int64_t i = 0; i < a.n_weights; ++i) {
        mc_collapse_args pooling{};  // the same demands on cache and weights, without blocks
        pooling.struct_size = sizeof pooling;
        pooling.k = with_batch(a.k);
        pooling.v = with_batch(a.v);
        pooling.weights = a.weights[i];
        out.pooling[i] = check_collapse(pooling);
        if (out.pooling[i].gists != 1) {
            invalid("weights.w: expected one gist a block, got shape " + shape_text(a.weights[i].w));
        }
        if (out.pooling[i].count != a.block_size) {
            invalid("weights.b: expected K = block_size = " + std::to_string(a.block_size) + ", got shape " +
                    shape_text(a.weights[i].b));
        }
    }
    check_store(a);
    check_arrays(a, out.slots);
    return out;
}

}  // namespace mc
