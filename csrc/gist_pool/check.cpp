// Checks of mc_gist_pool_cpu and mc_collapse_cpu. Whatever could make the kernels leave the caller's memory is refused
// here.
#include "check.h"

#include <vector>

namespace mc {
namespace {

void check_struct(size_t got, size_t want) {
    if (got == want) return;
    invalid("struct_size: expected " + std::to_string(want) + ", got " + std::to_string(got) +
            " (another version of mc_kernels.h?)");
}

Pooling check_weights(const mc_gist_pool_weights& x, const mc_tensor& k, int64_t heads) {
    check_view("weights.w", x.w, 4);
    check_view("weights.b", x.b, 4);
    check_view("weights.m", x.m, 4);
    check_view("weights.c", x.c, 3);
    check_dtype("weights.b", x.b, "weights.w", x.w);
    check_dtype("weights.m", x.m, "weights.w", x.w);
    check_dtype("weights.c", x.c, "weights.w", x.w);
    Pooling p{};
    p.dtype = k.dtype;
    p.weights_dtype = x.w.dtype;
    p.dims = k.size[4];
    if (p.dims < 1) invalid("k: expected D >= 1, got shape " + shape_text(k));
    p.layers = x.w.size[0];
    p.heads = heads;
    p.gists = x.w.size[2];
    p.count = x.b.size[3];
    check_sizes("weights.w", x.w, {-1, heads, -1, p.width()});
    check_sizes("weights.b", x.b, {p.layers, heads, p.gists, -1});
    check_sizes("weights.m", x.m, {p.layers, heads, p.width(), p.width()});
    check_sizes("weights.c", x.c, {p.layers, heads, p.width()});
    if (p.gists < 1) invalid("weights.w: expected G >= 1, got shape " + shape_text(x.w));
    if (p.count < 1) invalid("weights.b: expected K >= 1, got shape " + shape_text(x.b));
    p.w = static_cast<const char*>(x.w.data);
    p.b = static_cast<const char*>(x.b.data);
    p.m = static_cast<const char*>(x.m.data);
    p.c = static_cast<const char*>(x.c.data);
    byte_strides(x.w, 3, p.w_stride);
    byte_strides(x.b, 3, p.b_stride);
    byte_strides(x.m, 3, p.m_stride);
    byte_strides(x.c, 2, p.c_stride);
    return p;
}

void check_apart(const char* name, const mc_tensor& x, const char* other_name, const mc_tensor& other) {
    if (!is_empty(x) && !is_empty(other) && x.data == other.data) {
        invalid(std::string(name) + ": expected memory apart from " + other_name + ", got the same address");
    }
}

void check_apart_from_weights(const char* name, const mc_tensor& x, const mc_gist_pool_weights& weights) {
    check_apart(name, x, "weights.w", weights.w);
    check_apart(name, x, "weights.b", weights.b);
    check_apart(name, x, "weights.m", weights.m);
    check_apart(name, x, "weights.c", weights.c);
}

// [rows, columns] slots, each below n_slots.
void check_slots(const char* name, const int64_t* slots, int64_t rows, int64_t columns, int64_t n_slots) {
    if (rows && !slots) invalid(std::string(name) + ": expected an array, got NULL");
    for (int64_t i = 0; i < rows * columns; ++i) {
        if (slots[i] < 0 || slots[i] >= n_slots) {
            invalid(std::string(name) + "[" + std::to_string(i / columns) + ", " + std::to_string(i % columns) +
                    "]: expected 0.." + std::to_string(n_slots - 1) + ", got " + std::to_string(slots[i]));
        }
    }
}

void check_once(const int64_t* slots, int64_t n, int64_t n_slots) {
    std::vector<bool> seen(static_cast<size_t>(n_slots));
    for (int64_t i = 0; i < n; ++i) {
        const size_t slot = static_cast<size_t>(slots[i]);
        if (seen[slot]) invalid("gist_slots: expected each slot once, got " + std::to_string(slots[i]) + " twice");
        seen[slot] = true;
    }
}

void check_segments(const int64_t* s, int64_t n, int64_t slots) {
    if (n && !s) invalid("segments: expected an array, got NULL");
    for (int64_t i = 0; i < n; ++i, s += 3) {
        if (s[2] < 0 || s[0] < 0 || s[1] < 0 || s[2] > slots - s[0] || s[2] > slots - s[1]) {
            invalid("segments[" + std::to_string(i) + "]: expected slots within " + std::to_string(slots) + ", got (" +
                    std::to_string(s[0]) + ", " + std::to_string(s[1]) + ", " + std::to_string(s[2]) + ")");
        }
    }
}

}  // namespace

void byte_strides(const mc_tensor& x, int n, int64_t* out) {
    for (int i = 0; i < n; ++i) out[i] = x.stride[i] * dtype_bytes(x.dtype);
}

Pooling check_gist_pool(const mc_gist_pool_args& a) {
    check_struct(a.struct_size, sizeof(mc_gist_pool_args));
    check_view("k", a.k, 5);
    check_view("v", a.v, 5);
    check_view("k_gist", a.k_gist, 5);
    check_view("v_gist", a.v_gist, 5);
    check_dtype("v", a.v, "k", a.k);
    check_dtype("k_gist", a.k_gist, "k", a.k);
    check_dtype("v_gist", a.v_gist, "k", a.k);
    const int64_t* n = a.k.size;
    const Pooling p = check_weights(a.weights, a.k, n[1]);
    if (p.count != n[3]) check_sizes("weights.b", a.weights.b, {p.layers, p.heads, p.gists, n[3]});
    check_sizes("v", a.v, {n[0], n[1], n[2], n[3], n[4]});
    check_sizes("k_gist", a.k_gist, {n[0], n[1], n[2], p.gists, n[4]});
    check_sizes("v_gist", a.v_gist, {n[0], n[1], n[2], p.gists, n[4]});
    if (p.layers < 1 || n[0] % p.layers) {
        invalid("k: expected R that is a multiple of the weights' L = " + std::to_string(p.layers) +
                ", got R = " + std::to_string(n[0]));
    }
    check_no_overlap("k_gist", a.k_gist);
    check_no_overlap("v_gist", a.v_gist);
    check_apart("v_gist", a.v_gist, "k_gist", a.k_gist);
    const mc_tensor* const outputs[2] = {&a.k_gist, &a.v_gist};
    static const char* const names[2] = {"k_gist", "v_gist"};
    for (int i = 0; i < 2; ++i) {
        check_apart(names[i], *outputs[i], "k", a.k);
        check_apart(names[i], *outputs[i], "v", a.v);
        check_apart_from_weights(names[i], *outputs[i], a.weights);
    }
    return p;
}

Pooling check_collapse(const mc_collapse_args& a) {
    check_struct(a.struct_size, sizeof(mc_collapse_args));
    check_view("k", a.k, 5);
    check_view("v", a.v, 5);
    check_dtype("v", a.v, "k", a.k);
    const int64_t* n = a.k.size;
    check_sizes("v", a.v, {n[0], n[1], n[2], n[3], n[4]});
    const Pooling p = check_weights(a.weights, a.k, n[2]);
    if (p.layers != n[0]) check_sizes("weights.w", a.weights.w, {n[0], p.heads, p.gists, p.width()});
    check_no_overlap("k", a.k);
    check_no_overlap("v", a.v);
    check_apart("v", a.v, "k", a.k);
    check_apart_from_weights("k", a.k, a.weights);
    check_apart_from_weights("v", a.v, a.weights);
    if (a.n_blocks < 0) invalid("n_blocks: expected at least 0, got " + std::to_string(a.n_blocks));
    if (a.n_segments < 0) invalid("n_segments: expected at least 0, got " + std::to_string(a.n_segments));
    check_slots("children", a.children, a.n_blocks, p.count, n[3]);
    check_slots("gist_slots", a.gist_slots, a.n_blocks, p.gists, n[3]);
    check_once(a.gist_slots, a.n_blocks * p.gists, n[3]);
    check_segments(a.segments, a.n_segments, n[3]);
    return p;
}

}  // namespace mc
