// Python's way to the CUDA library, and to its emulated build: as bindings.cpp, with a workspace and a stream as addresses.
#include "bindings.h"

#if defined(MC_EMULATED)
extern "C" void mc_emulate(uint64_t seed, int32_t threads, int32_t blocks, int32_t fault);
extern "C" void mc_emulate_device(int32_t multiprocessors, int64_t shared_bytes);
extern "C" const char* mc_emulate_launches();
#endif

namespace {

void raise(int32_t status) { raise_with(status, mc_cuda_last_error); }

// Launches return at once, so the interpreter lock is kept.
#if defined(MC_EMULATED)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

struct Where {
    uintptr_t workspace;
    int64_t bytes;
    uintptr_t stream;

    void* memory() const { return reinterpret_cast<void*>(workspace); }
    void* on() const { return reinterpret_cast<void*>(stream); }
};

// where: NULL asks for the bytes of workspace.
int64_t kv_splice(const py::handle& k, const py::handle& v, const py::handle& k_new, const py::handle& v_new,
                  const py::handle& table, int64_t n_plans, uintptr_t offsets, uintptr_t rows, uintptr_t segments,
                  uintptr_t stays, uintptr_t insert_slots, uintptr_t positions, uintptr_t new_positions,
                  int64_t inv_freq_rows, uintptr_t inv_freq, int64_t half, bool interleaved, double attention_scaling,
                  const Where* where) {
    const mc_kv_splice_args a =
        splice_args(k, v, k_new, v_new, table, n_plans, offsets, rows, segments, stays, insert_slots, positions,
                    new_positions, inv_freq_rows, inv_freq, half, interleaved, attention_scaling);
    int64_t bytes = 0;
    raise(where ? mc_kv_splice_cuda(&a, where->memory(), where->bytes, where->on())
                : mc_kv_splice_cuda_workspace(&a, &bytes));
    return bytes;
}

void gist_pool(const py::handle& k, const py::handle& v, const py::handle& w, const py::handle& b, const py::handle& m,
               const py::handle& c, const py::handle& k_gist, const py::handle& v_gist, uintptr_t stream) {
    const mc_gist_pool_args a = pool_args(k, v, w, b, m, c, k_gist, v_gist);
    raise(mc_gist_pool_cuda(&a, reinterpret_cast<void*>(stream)));
}

int64_t collapse(const py::handle& k, const py::handle& v, const py::handle& w, const py::handle& b,
                 const py::handle& m, const py::handle& c, int64_t n_blocks, uintptr_t children, uintptr_t gist_slots,
                 int64_t n_segments, uintptr_t segments, const Where* where) {
    const mc_collapse_args a = collapse_args(k, v, w, b, m, c, n_blocks, children, gist_slots, n_segments, segments);
    int64_t bytes = 0;
    raise(where ? mc_collapse_cuda(&a, where->memory(), where->bytes, where->on())
                : mc_collapse_cuda_workspace(&a, &bytes));
    return bytes;
}

int64_t lens_score(const py::handle& entries, const py::handle& features, const py::handle& queries,
                   const py::tuple& weights, int64_t n_heads, uintptr_t legal, const py::handle& out,
                   const Where* where) {
    const mc_lens_score_args a = lens_args(entries, features, queries, weights, n_heads, legal, out);
    int64_t bytes = 0;
    raise(where ? mc_lens_score_cuda(&a, where->memory(), where->bytes, where->on())
                : mc_lens_score_cuda_workspace(&a, &bytes));
    return bytes;
}

int64_t context_attention(const py::handle& q, const py::handle& k, const py::handle& v, uintptr_t q_pos,
                          uintptr_t kv_pos, uintptr_t inv_freq, int64_t half, bool interleaved,
                          double attention_scaling, uintptr_t sigma, uintptr_t kv_bias, double scale,
                          const py::handle& out, uintptr_t lse, uintptr_t mass, const Where* where) {
    const mc_context_attention_args a = attention_args(q, k, v, q_pos, kv_pos, inv_freq, half, interleaved,
                                                       attention_scaling, sigma, kv_bias, scale, out, lse, mass);
    int64_t bytes = 0;
    raise(where ? mc_context_attention_cuda(&a, where->memory(), where->bytes, where->on())
                : mc_context_attention_cuda_workspace(&a, &bytes));
    return bytes;
}

int64_t gist_encode(const py::sequence& tensors, int64_t n_heads, int32_t pool, double rope_theta, double target_rms,
                    const py::handle& blocks, const py::handle& out, int64_t level, const Where* where) {
    const mc_gist_encode_weights w = encoder(tensors, n_heads, pool, rope_theta, target_rms);
    mc_gist_encode_args a{};
    a.struct_size = sizeof a;
    a.blocks = tensor("blocks", blocks);
    a.out = tensor("out", out);
    a.level = level;
    int64_t bytes = 0;
    raise(where ? mc_gist_encode_cuda(&w, &a, where->memory(), where->bytes, where->on())
                : mc_gist_encode_cuda_workspace(&w, &a, &bytes));
    return bytes;
}

}  // namespace

PYBIND11_MODULE(MC_MODULE, m) {
    m.attr("emulated") = kEmulated;
    m.def("version", &mc_cuda_version);
    m.def("architectures", &mc_cuda_architectures);
#if defined(MC_EMULATED)
    m.def("emulate", &mc_emulate, "seed"_a, "threads"_a, "blocks"_a, "fault"_a);
    m.def("emulate_launches", &mc_emulate_launches);
    m.def("emulate_device", &mc_emulate_device, "multiprocessors"_a, "shared_bytes"_a);
#endif
    py::class_<Where>(m, "Where")
        .def(py::init(
                 [](uintptr_t workspace, int64_t bytes, uintptr_t stream) { return Where{workspace, bytes, stream}; }),
             "workspace"_a, "bytes"_a, "stream"_a);
    m.def("kv_splice", &kv_splice, "k"_a, "v"_a, "k_new"_a, "v_new"_a, "table"_a, "n_plans"_a, "offsets"_a, "rows"_a,
          "segments"_a, "stays"_a, "insert_slots"_a, "positions"_a, "new_positions"_a, "inv_freq_rows"_a, "inv_freq"_a,
          "half"_a, "interleaved"_a, "attention_scaling"_a, "where"_a.none(true));
    m.def("gist_pool", &gist_pool, "k"_a, "v"_a, "w"_a, "b"_a, "m"_a, "c"_a, "k_gist"_a, "v_gist"_a, "stream"_a);
    m.def("collapse", &collapse, "k"_a, "v"_a, "w"_a, "b"_a, "m"_a, "c"_a, "n_blocks"_a, "children"_a, "gist_slots"_a,
          "n_segments"_a, "segments"_a, "where"_a.none(true));
    m.def("lens_score", &lens_score, "entries"_a, "features"_a, "queries"_a, "weights"_a, "n_heads"_a, "legal"_a,
          "out"_a, "where"_a.none(true));
    m.def("context_attention", &context_attention, "q"_a, "k"_a, "v"_a, "q_pos"_a, "kv_pos"_a, "inv_freq"_a, "half"_a,
          "interleaved"_a, "attention_scaling"_a, "sigma"_a, "kv_bias"_a, "scale"_a, "out"_a, "lse"_a, "mass"_a,
          "where"_a.none(true));
    m.def("gist_encode", &gist_encode, "tensors"_a, "n_heads"_a, "pool"_a, "rope_theta"_a, "target_rms"_a, "blocks"_a,
          "out"_a, "level"_a, "where"_a.none(true));
}
