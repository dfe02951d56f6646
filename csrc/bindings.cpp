// Python's way to the C ABI: tensors and integers come in, a status goes out as an exception. No torch header: one build
// serves every torch version.
//
// A tensor says itself where it lies (exchange.h), or is (address, dtype code, sizes, strides in elements), or None; an
// array of the plan is an address, 0: NULL.
#include <iterator>
#include <string>
#include <utility>

#include "bindings.h"
#include "bindings_decoder.h"
#include "dlpack.h"
#include "openmp.h"

namespace {

void raise(int32_t status) { raise_with(status, mc_last_error); }

void kv_splice(const py::handle& k, const py::handle& v, const py::handle& k_new, const py::handle& v_new,
               const py::handle& table, int64_t n_plans, uintptr_t offsets, uintptr_t rows, uintptr_t segments,
               uintptr_t stays, uintptr_t insert_slots, uintptr_t positions, uintptr_t new_positions,
               int64_t inv_freq_rows, uintptr_t inv_freq, int64_t half, bool interleaved, double attention_scaling,
               int32_t n_threads) {
    const mc_kv_splice_args a =
        splice_args(k, v, k_new, v_new, table, n_plans, offsets, rows, segments, stays, insert_slots, positions,
                    new_positions, inv_freq_rows, inv_freq, half, interleaved, attention_scaling);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_kv_splice_cpu(&a, n_threads);
    }
    raise(status);  // the text is this thread's own
}

void context_attention(const py::handle& q, const py::handle& k, const py::handle& v, uintptr_t q_pos, uintptr_t kv_pos,
                       uintptr_t inv_freq, int64_t half, bool interleaved, double attention_scaling, uintptr_t sigma,
                       uintptr_t kv_bias, double scale, const py::handle& out, uintptr_t lse, uintptr_t mass,
                       int32_t n_threads) {
    const mc_context_attention_args a = attention_args(q, k, v, q_pos, kv_pos, inv_freq, half, interleaved,
                                                       attention_scaling, sigma, kv_bias, scale, out, lse, mass);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_context_attention_cpu(&a, n_threads);
    }
    raise(status);
}

void gist_pool(const py::handle& k, const py::handle& v, const py::handle& w, const py::handle& b, const py::handle& m,
               const py::handle& c, const py::handle& k_gist, const py::handle& v_gist, int32_t n_threads) {
    const mc_gist_pool_args a = pool_args(k, v, w, b, m, c, k_gist, v_gist);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_gist_pool_cpu(&a, n_threads);
    }
    raise(status);
}

void collapse(const py::handle& k, const py::handle& v, const py::handle& w, const py::handle& b, const py::handle& m,
              const py::handle& c, int64_t n_blocks, uintptr_t children, uintptr_t gist_slots, int64_t n_segments,
              uintptr_t segments, int32_t n_threads) {
    const mc_collapse_args a = collapse_args(k, v, w, b, m, c, n_blocks, children, gist_slots, n_segments, segments);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_collapse_cpu(&a, n_threads);
    }
    raise(status);
}

void fused_linear(const py::handle& x, const py::handle& weight, const py::handle& norm, double eps,
                  const py::handle& bias, bool swiglu, const py::handle& residual, const py::handle& out,
                  int32_t n_threads, const py::object& packed) {
    mc_fused_linear_args a{};
    a.struct_size = sizeof a;
    a.x = tensor("x", x);
    a.weight = tensor("weight", weight);
    a.packed = packed_weight(packed);
    a.norm = tensor("norm", norm);
    a.eps = eps;
    a.bias = tensor("bias", bias);
    a.swiglu = swiglu;
    a.residual = tensor("residual", residual);
    a.out = tensor("out", out);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_fused_linear_cpu(&a, n_threads);
    }
    raise(status);
}

void lens_score(const py::handle& entries, const py::handle& features, const py::handle& queries,
                const py::tuple& weights, int64_t n_heads, uintptr_t legal, const py::handle& out, int32_t n_threads) {
    const mc_lens_score_args a = lens_args(entries, features, queries, weights, n_heads, legal, out);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_lens_score_cpu(&a, n_threads);
    }
    raise(status);
}

int64_t gist_encode_packed_bytes(const py::sequence& tensors, int64_t n_heads, int32_t pool, double rope_theta,
                                 double target_rms, int32_t dtype) {
    const mc_gist_encode_weights w = encoder(tensors, n_heads, pool, rope_theta, target_rms);
    int64_t bytes = 0;
    raise(mc_gist_encode_packed_bytes(&w, dtype, &bytes));
    return bytes;
}

void gist_encode_pack(const py::sequence& tensors, int64_t n_heads, int32_t pool, double rope_theta, double target_rms,
                      int32_t dtype, uintptr_t packed, int64_t bytes, int32_t n_threads) {
    const mc_gist_encode_weights w = encoder(tensors, n_heads, pool, rope_theta, target_rms);
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_gist_encode_pack_cpu(&w, dtype, reinterpret_cast<void*>(packed), bytes, n_threads);
    }
    raise(status);
}

void gist_encode(uintptr_t packed, int64_t packed_bytes, const py::handle& blocks, const py::handle& out, int64_t level,
                 int32_t n_threads) {
    mc_gist_encode_args a{};
    a.struct_size = sizeof a;
    a.packed = reinterpret_cast<const void*>(packed);
    a.packed_bytes = packed_bytes;
    a.blocks = tensor("blocks", blocks);
    a.out = tensor("out", out);
    a.level = level;
    int32_t status;
    {
        py::gil_scoped_release release;
        status = mc_gist_encode_cpu(&a, n_threads);
    }
    raise(status);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("F32") = static_cast<int>(MC_F32);
    m.attr("F16") = static_cast<int>(MC_F16);
    m.attr("BF16") = static_cast<int>(MC_BF16);
    m.attr("I32") = static_cast<int>(MC_I32);
    m.attr("I64") = static_cast<int>(MC_I64);
    m.attr("F8E4M3") = static_cast<int>(MC_F8E4M3);
    m.def("version", &mc_version);
    m.def("read_dlpack", &dlpack::read, "capsule"_a);
    m.def("write_dlpack", &dlpack::write, "address"_a, "code"_a, "bits"_a, "shape"_a, "owner"_a);
    m.def("cpu_isa", [] {
        const char* name = mc_cpu_isa();
        if (!name) raise(MC_UNAVAILABLE);
        return name;
    });
    m.def("cpu_isa_available", [](const std::string& name) { return mc_cpu_isa_available(name.c_str()) != 0; });
    m.def("set_cpu_isa", [](const py::object& name) {
        raise(mc_set_cpu_isa(name.is_none() ? nullptr : py::cast<std::string>(name).c_str()));
    });
    m.def("use_openmp_of", &use_openmp_of, "user"_a);
    m.def("use_own_threads", [] { raise(mc_set_parallel_runner(nullptr, nullptr)); });
    m.def("kv_splice", &kv_splice, "k"_a, "v"_a, "k_new"_a, "v_new"_a, "table"_a, "n_plans"_a, "offsets"_a, "rows"_a,
          "segments"_a, "stays"_a, "insert_slots"_a, "positions"_a, "new_positions"_a, "inv_freq_rows"_a, "inv_freq"_a,
          "half"_a, "interleaved"_a, "attention_scaling"_a, "n_threads"_a);
    m.def("context_attention", &context_attention, "q"_a, "k"_a, "v"_a, "q_pos"_a, "kv_pos"_a, "inv_freq"_a, "half"_a,
          "interleaved"_a, "attention_scaling"_a, "sigma"_a, "kv_bias"_a, "scale"_a, "out"_a, "lse"_a, "mass"_a,
          "n_threads"_a);
    m.def("gist_pool", &gist_pool, "k"_a, "v"_a, "w"_a, "b"_a, "m"_a, "c"_a, "k_gist"_a, "v_gist"_a, "n_threads"_a);
    m.def("collapse", &collapse, "k"_a, "v"_a, "w"_a, "b"_a, "m"_a, "c"_a, "n_blocks"_a, "children"_a, "gist_slots"_a,
          "n_segments"_a, "segments"_a, "n_threads"_a);
    m.def("fused_linear", &fused_linear, "x"_a, "weight"_a, "norm"_a, "eps"_a, "bias"_a, "swiglu"_a, "residual"_a,
          "out"_a, "n_threads"_a, "packed"_a = py::none());
    define_decoder_layers(m);
    define_watched_tables(m);
    m.def("lens_score", &lens_score, "entries"_a, "features"_a, "queries"_a, "weights"_a, "n_heads"_a, "legal"_a,
          "out"_a, "n_threads"_a);
    m.def("gist_encode_packed_bytes", &gist_encode_packed_bytes, "tensors"_a, "n_heads"_a, "pool"_a, "rope_theta"_a,
          "target_rms"_a, "dtype"_a);
    m.def("gist_encode_pack", &gist_encode_pack, "tensors"_a, "n_heads"_a, "pool"_a, "rope_theta"_a, "target_rms"_a,
          "dtype"_a, "packed"_a, "bytes"_a, "n_threads"_a);
    m.def("gist_encode", &gist_encode, "packed"_a, "packed_bytes"_a, "blocks"_a, "out"_a, "level"_a, "n_threads"_a);
}
