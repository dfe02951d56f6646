// decoder_layers on a CPU: layers of a decoder as calls of fused_linear and context_attention. The contract: mc_kernels.h.
//
// Floor. All weights are read once; that is 2 * (Hq + 2 Hkv) D E + ... bytes a layer over the read bandwidth, and the keys
// and values that are seen. Nothing here is arithmetic but the norm of queries' and keys' heads, which is fused_linear's.
// What is won is what a host program would do between the calls: the stream of weights evicts its code and data from
// the caches, so that each of five calls a layer begins with misses.
#include <algorithm>
#include <cstring>

#include "../fused_linear/choice.h"
#include "check.h"
#include "pool.h"
#include "team.h"

namespace mc {
namespace {

constexpr int64_t kThreadBytes = 1 << 16;  // of weights that are worth waking a thread for, as fused_linear has it

class Layers {
public:
    Layers(const mc_decoder_layers_args& a, int32_t n_threads)
        : a_(a), call_(check_decoder_layers(a)), s_(call_.shape), n_threads_(n_threads), bytes_(dtype_bytes(a.x.dtype)),
          ops_(linear_ops(isa_level(), "decoder_layers")),
          gain_(s_.dims), head_(s_.dims),
          final_gain_(a.final_norm.ndim ? s_.embed : 0), final_row_(a.final_norm.ndim ? s_.embed : 0) {}

    // What its largest job, a product, is worth: each has fewer of them where there is less to do.
    int threads() const {
        const int64_t widest = std::max(s_.layers ? 2 * s_.ffn : 0, s_.vocab);
        const int64_t bytes = s_.rows() ? widest * s_.embed * bytes_ : 0;
        return static_cast<int>(std::min<int64_t>(default_threads(n_threads_), bytes / kThreadBytes));
    }

    void run() {
        if (s_.rows() == 0 || s_.embed == 0) {
            clear_mass();
            return look_up();
        }
        if (!s_.layers) pass_on();
        for (int64_t l = 0; l < s_.layers; ++l) {
            const LayerCalls& layer = call_.layers[static_cast<size_t>(l)];
            must(mc_fused_linear_cpu(&layer.qkv, n_threads_));
            norm_heads(a_.layers[l].q_norm, 0, s_.heads);
            norm_heads(a_.layers[l].k_norm, s_.heads, s_.kv_heads);
            keep(a_.k, l, s_.heads);
            keep(a_.v, l, s_.heads + s_.kv_heads);
            must(mc_context_attention_cpu(&layer.attention, n_threads_));
            must(mc_fused_linear_cpu(&layer.out, n_threads_));
            must(mc_fused_linear_cpu(&layer.gate_up, n_threads_));
            must(mc_fused_linear_cpu(&layer.down, n_threads_));
        }
        norm_out();
        look_up();
    }

private:
    // Arguments have been checked: all that may be lacking is memory.
    static void must(int32_t status) {
        if (status == MC_OUT_OF_MEMORY) {
            throw Error(status, "out of memory: no scratch for a layer; slots, out, mass and logits may have been written");
        }
        if (status != MC_OK) throw Error(status, mc_last_error());
    }

    void clear_mass() const {
        for (int64_t i = 0; a_.mass && i < s_.layers * s_.batch * a_.used; ++i) a_.mass[i] = 0.0f;
    }

    void pass_on() const {
        for (int64_t i = 0; i < s_.rows(); ++i) {
            std::memcpy(static_cast<char*>(a_.out.data) + i * a_.out.stride[0] * bytes_,
                        static_cast<const char*>(a_.x.data) + i * a_.x.stride[0] * bytes_,
                        static_cast<size_t>(s_.embed * bytes_));
        }
    }

    char* head(int64_t row, int64_t h) const {
        return call_.between.qkv.get() + (row * s_.qkv_rows() + h * s_.dims) * bytes_;
    }

    // A vector of n gains in fp32.
    void widen(const mc_tensor& norm, int64_t n, float* gain) const {
        ops_.widen[norm.dtype][0]({static_cast<const char*>(norm.data), n, n, nullptr, 0.0f, gain});
    }

    // x [n] in place; row [n]: scratch.
    void norm_row(char* x, int64_t n, const float* gain, float* row) const {
        ops_.widen[a_.x.dtype][0]({x, n, n, gain, static_cast<float>(a_.eps), row});
        FinishRow rounded{};
        rounded.y = row;
        rounded.n = n;
        rounded.out = x;
        ops_.finish[a_.x.dtype](rounded);
    }

    void norm_heads(const mc_tensor& norm, int64_t first, int64_t n) const {
        if (!norm.ndim) return;
        widen(norm, s_.dims, gain_.get());
        for (int64_t row = 0; row < s_.rows(); ++row) {
            for (int64_t h = first; h < first + n; ++h) norm_row(head(row, h), s_.dims, gain_.get(), head_.get());
        }
    }

    void norm_out() const {
        if (!a_.final_norm.ndim) return;
        widen(a_.final_norm, s_.embed, final_gain_.get());
        for (int64_t row = 0; row < s_.rows(); ++row) {
            char* out = static_cast<char*>(a_.out.data) + row * a_.out.stride[0] * bytes_;
            norm_row(out, s_.embed, final_gain_.get(), final_row_.get());
        }
    }

    void look_up() const {
        if (s_.vocab) must(mc_fused_linear_cpu(&call_.head, n_threads_));
    }

    // Heads [first, first + Hkv) of all entries to their slots of layer l.
    void keep(const mc_tensor& cache, int64_t l, int64_t first) const {
        for (int64_t row = 0; row < s_.rows(); ++row) {
            for (int64_t h = 0; h < s_.kv_heads; ++h) {
                const int64_t at = l * cache.stride[0] + row / s_.length * cache.stride[1] + h * cache.stride[2] +
                                   a_.slots[row] * cache.stride[3];
                std::memcpy(static_cast<char*>(cache.data) + at * bytes_, head(row, first + h),
                            static_cast<size_t>(s_.dims * bytes_));
            }
        }
    }

    const mc_decoder_layers_args& a_;
    const DecoderCall call_;
    const DecoderShape& s_;
    const int32_t n_threads_;
    const int64_t bytes_;
    const LinearOps& ops_;
    const Scratch<float> gain_, head_;              // [D]
    const Scratch<float> final_gain_, final_row_;  // [E] with a final norm
};

}  // namespace
}  // namespace mc

extern "C" int32_t mc_decoder_layers_cpu(const mc_decoder_layers_args* args, int32_t n_threads) {
    return mc::guarded([&] {
        if (!args) mc::invalid("args: expected an address, got NULL");
        if (n_threads < 0) mc::invalid("n_threads: expected at least 0, got " + std::to_string(n_threads));
        mc::Layers layers(*args, n_threads);
        mc::with_team(layers.threads(), [&] { layers.run(); });
    });
}
