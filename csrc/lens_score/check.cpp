// Checks of mc_lens_score_cpu. Whatever could make the kernel leave the caller's memory is refused here.
#include "check.h"

namespace mc {

using Args = mc_lens_score_args;

const LensWeight kLensWeightViews[kLensWeights] = {
    {"w_in", &Args::w_in},         {"read_norm", &Args::read_norm},
    {"read_q", &Args::read_q},     {"read_k", &Args::read_k},
    {"read_v", &Args::read_v},     {"read_out", &Args::read_out},
    {"mlp_norm", &Args::mlp_norm}, {"mlp_gate_up", &Args::mlp_gate_up},
    {"mlp_down", &Args::mlp_down}, {"score_norm", &Args::score_norm},
    {"score_q", &Args::score_q},   {"score_k", &Args::score_k},
    {"score_v", &Args::score_v},   {"direct", &Args::direct},
    {"head_in", &Args::head_in},   {"head_bias", &Args::head_bias},
    {"head_out", &Args::head_out}, {"head_out_bias", &Args::head_out_bias},
};

namespace {

void check_views(const Args& a) {
    static const int kDims[kLensWeights] = {2, 2, 3, 3, 3, 3, 2, 3, 3, 1, 2, 2, 2, 2, 2, 1, 2, 1};
    check_view("entries", a.entries, 2);
    check_view("features", a.features, 2);
    check_view("queries", a.queries, 2);
    check_view("out", a.out, 2);
    check_dtype("queries", a.queries, "entries", a.entries);
    for (const mc_tensor* x : {&a.features, &a.out}) {
        if (x->dtype != MC_F32) {
            throw Error(MC_INVALID_DTYPE, std::string(x == &a.out ? "out" : "features") +
                                              ": expected dtype MC_F32, got " + std::to_string(x->dtype));
        }
    }
    for (int i = 0; i < kLensWeights; ++i) {
        const LensWeight& w = kLensWeightViews[i];
        check_view(w.name, a.*w.view, kDims[i]);
        check_dtype(w.name, a.*w.view, "w_in", a.w_in);
    }
}

Lens sizes_of(const Args& a) {
    Lens x{};
    x.dtype = a.entries.dtype;
    x.weight_dtype = a.w_in.dtype;
    x.entries = a.entries.size[0];
    x.dims = a.entries.size[1];
    x.queries = a.queries.size[0];
    x.width = a.w_in.size[0];
    x.heads = a.n_heads;
    x.passes = a.read_q.size[0];
    x.ffn = a.mlp_down.size[2];
    x.direct = a.direct.size[0];
    x.features = a.features.size[1];
    x.hidden = a.head_in.size[0];
    x.inputs = a.head_in.size[1];
    const auto least = [](const char* what, int64_t n) {
        if (n < 1) invalid(std::string(what) + " >= 1, got 0");
    };
    least("entries: expected E", x.dims);
    least("w_in: expected d", x.width);
    if (x.queries < 1 || x.queries > kMostQueries) {
        invalid("queries: expected 1 <= Q <= " + std::to_string(kMostQueries) + ", got Q=" + std::to_string(x.queries));
    }
    if (x.direct > kMostDirect) {
        invalid("direct: expected at most " + std::to_string(kMostDirect) + " rows, got " + std::to_string(x.direct));
    }
    const int64_t values = a.score_v.size[0];
    if (x.heads < 1 || x.width % x.heads || values % x.heads) {
        invalid("n_heads: expected a divisor of d=" + std::to_string(x.width) + " and H dv=" + std::to_string(values) +
                ", got " + std::to_string(x.heads));
    }
    x.head_values = values / x.heads;
    return x;
}

void check_shapes(const Args& a, const Lens& x) {
    const int64_t d = x.width, e = x.dims, p = x.passes, f = x.ffn;
    check_sizes("features", a.features, {x.entries, -1});
    check_sizes("queries", a.queries, {-1, e});
    check_sizes("w_in", a.w_in, {-1, e});
    check_sizes("read_norm", a.read_norm, {p, d});
    check_sizes("read_q", a.read_q, {p, d, d});
    check_sizes("read_k", a.read_k, {p, d, e});
    check_sizes("read_v", a.read_v, {p, d, e});
    check_sizes("read_out", a.read_out, {p, d, d});
    check_sizes("mlp_norm", a.mlp_norm, {p, d});
    check_sizes("mlp_gate_up", a.mlp_gate_up, {p, 2 * f, d});
    check_sizes("mlp_down", a.mlp_down, {p, d, f});
    check_sizes("score_norm", a.score_norm, {d});
    check_sizes("score_q", a.score_q, {d, e});
    check_sizes("score_k", a.score_k, {d, d});
    check_sizes("score_v", a.score_v, {x.heads * x.head_values, d});
    check_sizes("direct", a.direct, {x.direct, e});
    check_sizes("head_in", a.head_in, {-1, x.heads * x.head_values + x.heads + x.direct + x.features});
    check_sizes("head_bias", a.head_bias, {x.hidden});
    check_sizes("head_out", a.head_out, {2, x.hidden});
    check_sizes("head_out_bias", a.head_out_bias, {2});
    check_sizes("out", a.out, {x.entries, 2});
}

void check_out(const Args& a) {
    check_no_overlap("out", a.out);
    if (is_empty(a.out)) return;
    const auto apart = [&](const char* name, const void* data) {
        if (data == a.out.data)
            invalid(std::string("out: expected memory apart from ") + name + ", got the same address");
    };
    apart("legal", a.legal);
    const mc_tensor* const inputs[3] = {&a.entries, &a.features, &a.queries};
    static const char* const names[3] = {"entries", "features", "queries"};
    for (int i = 0; i < 3; ++i) {
        if (!is_empty(*inputs[i])) apart(names[i], inputs[i]->data);
    }
    for (const LensWeight& w : kLensWeightViews) {
        if (!is_empty(a.*w.view)) apart(w.name, (a.*w.view).data);
    }
}

}  // namespace

Lens check_lens_score(const Args& a) {
    if (a.struct_size != sizeof(Args)) {
        invalid("struct_size: expected " + std::to_string(sizeof(Args)) + ", got " + std::to_string(a.struct_size) +
                " (another version of mc_kernels.h?)");
    }
    check_views(a);
    const Lens x = sizes_of(a);
    check_shapes(a, x);
    check_out(a);
    return x;
}

}  // namespace mc
