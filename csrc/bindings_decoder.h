// decoder_layers for Python: an object that holds a decoder's weights, and the call; packed weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_watch.h"

namespace {

// (address, bits), or None.
mc_packed_weight packed_weight(const py::handle& given) {
    if (given.is_none()) return {};
    const auto parts = py::cast<py::tuple>(given);
    if (parts.size() != 2) throw py::value_error("packed: expected (address, bits)");
    return {reinterpret_cast<const void*>(py::cast<uintptr_t>(parts[0])), py::cast<int32_t>(parts[1])};
}

// How queries and keys turn. inv_freq: address of [half] doubles, which the caller keeps.
struct Rope {
    uintptr_t inv_freq;
    int64_t half;
    bool interleaved;
    double attention_scaling;
};

// A call's tensor as it comes: contiguous, on the CPU, of `ndim` dimensions. False: it is none such.
bool usual(const py::handle& given, int32_t ndim, mc_tensor* out) {
    dlpack::Tensor seen{};
    if (!dlpack::look(given.ptr(), &seen) || seen.device.type != dlpack::kCpu || seen.ndim != ndim) return false;
    *out = as_view(seen);
    int64_t dense = 1;
    bool contiguous = true;
    for (int32_t i = ndim - 1; i >= 0; --i) {
        contiguous = contiguous && (out->size[i] <= 1 || out->stride[i] == dense);
        dense *= out->size[i];
    }
    return contiguous || !dense;
}

bool is_float(int32_t dtype) { return dtype == MC_F32 || dtype == MC_F16 || dtype == MC_BF16; }

bool has_sizes(const mc_tensor& x, std::initializer_list<int64_t> sizes) {
    return std::equal(sizes.begin(), sizes.end(), x.size, x.size + x.ndim);
}

// [L, B, Hkv, S, D] with a contiguous last dimension, on the CPU.
bool usual_cache(const py::handle& given, mc_tensor* out) {
    dlpack::Tensor seen{};
    if (!dlpack::look(given.ptr(), &seen) || seen.device.type != dlpack::kCpu || seen.ndim != 5) return false;
    *out = as_view(seen);
    const bool empty = std::find(out->size, out->size + 5, 0) != out->size + 5;
    return out->size[4] <= 1 || out->stride[4] == 1 || empty;
}

// [rows, width] of [B, T, width].
mc_tensor as_rows(const mc_tensor& x) {
    mc_tensor out = x;
    out.ndim = 2;
    out.size[0] = x.size[0] * x.size[1];
    out.size[1] = out.stride[0] = x.size[2];
    out.stride[1] = 1;
    return out;
}

// What stands for a weight [rows, inputs]: bytes [rows / 16, inputs / 32, 384 or 640], contiguous, on the CPU.
bool usual_packed(const py::handle& given, int64_t rows, int64_t inputs, mc_packed_weight* out) {
    mc_tensor x{};
    dlpack::Tensor seen{};
    if (!usual(given, 3, &x) || !dlpack::look(given.ptr(), &seen)) return false;
    const int64_t four = 256 + 128, eight = 512 + 128;
    if (seen.dtype.code != 1 || seen.dtype.bits != 8 || inputs % 32 || x.size[0] != (rows + 15) / 16 ||
        x.size[1] != inputs / 32 || (x.size[2] != four && x.size[2] != eight)) {
        return false;
    }
    *out = {x.data, x.size[2] == eight ? 8 : 4};
    return true;
}

class DecoderLayers {
public:
    // Of each layer: 10 tensors or None, and 4 times (address, bits) of what stands for a matrix or None, in the order of
    // mc_decoder_layer. counted: tensors whose values must stay what they are, since packed weights stand for them.
    DecoderLayers(const py::sequence& layers, const py::sequence& counted, double eps, const py::object& rope)
        : eps_(eps) {
        using Layer = mc_decoder_layer;
        static constexpr mc_tensor Layer::* fields[] = {
            &Layer::attention_norm, &Layer::qkv,      &Layer::qkv_bias, &Layer::q_norm,  &Layer::k_norm,
            &Layer::out,            &Layer::out_bias, &Layer::ffn_norm, &Layer::gate_up, &Layer::down,
        };
        static constexpr mc_packed_weight Layer::* packed[] = {
            &Layer::qkv_packed, &Layer::out_packed, &Layer::gate_up_packed, &Layer::down_packed,
        };
        constexpr size_t n_tensors = std::size(fields), n_given = n_tensors + std::size(packed);
        for (const auto& given : layers) {
            const auto parts = py::cast<py::tuple>(given);
            if (parts.size() != n_given) {
                throw py::value_error("layers: expected " + std::to_string(n_given) + " weights each, got " +
                                      std::to_string(parts.size()));
            }
            Layer layer{};
            for (size_t i = 0; i < n_tensors; ++i) {
                layer.*fields[i] = tensor("layers", parts[i]);
                if (!parts[i].is_none()) watched_.emplace_back(parts[i]);
            }
            for (size_t i = n_tensors; i < n_given; ++i) layer.*packed[i - n_tensors] = packed_weight(parts[i]);
            layers_.push_back(layer);
        }
        for (const auto& given : counted) counted_.emplace_back(given);
        if (!rope.is_none()) {
            const auto parts = py::cast<py::tuple>(rope);
            if (parts.size() != 4) {
                throw py::value_error("rope: expected (address, half, interleaved, attention_scaling)");
            }
            rope_ = {py::cast<uintptr_t>(parts[0]), py::cast<int64_t>(parts[1]), py::cast<bool>(parts[2]),
                     py::cast<double>(parts[3])};
        }
    }

    // Whether a weight lies elsewhere than it did, or one that a packed weight stands for has other values: this object
    // must not run then.
    bool moved() const {
        constexpr size_t ahead = 8;
        for (size_t i = 0; i < watched_.size(); ++i) {
            if (i + ahead < watched_.size()) watched_[i + ahead].fetch();
            if (watched_[i].moved()) return true;
        }
        return std::any_of(counted_.begin(), counted_.end(), [](const Counted& x) { return x.changed(); });
    }

    // Layers [first, end) of entries x [B, T, E] into out; the other arguments as DecoderLayers.__call__ of Python has
    // them. False, and nothing done, where a tensor is not as it usually comes.
    bool run(int64_t first, int64_t end, const py::handle& x, const py::handle& positions, const py::handle& k,
             const py::handle& v, const py::handle& slots, const py::handle& kv_pos, const py::handle& kv_bias,
             const py::handle& out, const py::handle& mass, const py::handle& final_norm, const py::handle& head,
             const py::handle& head_packed, const py::handle& logits, int32_t n_threads) const {
        const auto n_layers = static_cast<int64_t>(layers_.size());
        if (first < 0 || first > end || end > n_layers) {
            throw py::value_error("layers: expected a range within 0.." + std::to_string(n_layers) + ", got " +
                                  std::to_string(first) + ".." + std::to_string(end));
        }
        mc_decoder_layers_args a{};
        mc_tensor entries, at, to, seen, bias{}, result, sums{};
        if (!usual(x, 3, &entries) || !is_float(entries.dtype)) return false;
        const int64_t batch = entries.size[0], length = entries.size[1], embed = entries.size[2];
        const auto numbers = [&](const py::handle& given, mc_tensor* t) {
            return usual(given, 2, t) && t->dtype == MC_I64 && t->size[0] == batch;
        };
        if (!numbers(positions, &at) || at.size[1] != length || !numbers(slots, &to) || to.size[1] != length ||
            !numbers(kv_pos, &seen)) {
            return false;
        }
        const int64_t used = seen.size[1];
        if (!usual_cache(k, &a.k) || !usual_cache(v, &a.v) || a.k.dtype != entries.dtype || a.v.dtype != entries.dtype ||
            a.k.size[0] != n_layers || a.k.size[1] != batch || !std::equal(a.k.size, a.k.size + 5, a.v.size)) {
            return false;
        }
        const int64_t dims = a.k.size[4];
        if (2 * rope_.half > dims) return false;
        if (!kv_bias.is_none() && !(usual(kv_bias, 2, &bias) && bias.dtype == MC_F32 && has_sizes(bias, {batch, used}))) {
            return false;
        }
        if (!usual(out, 3, &result) || result.dtype != entries.dtype || !has_sizes(result, {batch, length, embed})) {
            return false;
        }
        if (!mass.is_none() && !(usual(mass, 3, &sums) && sums.dtype == MC_F32 &&
                                 has_sizes(sums, {end - first, batch, used}))) {
            return false;
        }
        if (!final_norm.is_none() && !(usual(final_norm, 1, &a.final_norm) && is_float(a.final_norm.dtype) &&
                                       a.final_norm.size[0] == embed)) {
            return false;
        }
        if (head.is_none() && !(logits.is_none() && head_packed.is_none())) return false;
        if (!head.is_none() && !(usual(head, 2, &a.head) && is_float(a.head.dtype) && a.head.size[1] == embed &&
                                 usual(logits, 2, &a.logits) && a.logits.dtype == entries.dtype &&
                                 has_sizes(a.logits, {batch, a.head.size[0]}))) {
            return false;
        }
        if (!head_packed.is_none() &&
            (a.head.dtype == MC_F16 || !usual_packed(head_packed, a.head.size[0], embed, &a.head_packed))) {
            return false;
        }
        a.struct_size = sizeof a;
        a.layer_size = sizeof(mc_decoder_layer);
        a.n_layers = end - first;
        a.layers = layers_.data() + first;
        a.eps = eps_;
        a.x = as_rows(entries);
        a.out = as_rows(result);
        a.positions = static_cast<const int64_t*>(at.data);
        a.slots = static_cast<const int64_t*>(to.data);
        a.used = used;
        a.kv_pos = static_cast<const int64_t*>(seen.data);
        a.kv_bias = static_cast<const float*>(bias.data);
        for (mc_tensor* cache : {&a.k, &a.v}) {
            const int64_t bytes = cache->dtype == MC_F32 ? 4 : 2;
            if (cache->data) cache->data = static_cast<char*>(cache->data) + first * cache->stride[0] * bytes;
            cache->size[0] = end - first;
        }
        a.inv_freq = rope_.half ? array<double>(rope_.inv_freq) : nullptr;
        a.half = rope_.half;
        a.interleaved = rope_.interleaved;
        a.attention_scaling = rope_.attention_scaling;
        a.scale = std::pow(static_cast<double>(dims), -0.5);
        // What does not turn is not scaled while it is read.
        if (!rope_.half) a.scale *= rope_.attention_scaling * rope_.attention_scaling;
        a.mass = static_cast<float*>(sums.data);
        int32_t status;
        {
            py::gil_scoped_release release;
            status = mc_decoder_layers_cpu(&a, n_threads);
        }
        raise_with(status, mc_last_error);
        return true;
    }

private:
    std::vector<mc_decoder_layer> layers_;
    std::vector<Watched> watched_;
    std::vector<Counted> counted_;
    double eps_;
    Rope rope_{0, 0, false, 1.0};
};

void define_decoder_layers(py::module_& m) {
    py::class_<DecoderLayers>(m, "DecoderLayers")
        .def(py::init<const py::sequence&, const py::sequence&, double, const py::object&>(), "layers"_a, "counted"_a,
             "eps"_a, "rope"_a)
        .def("moved", &DecoderLayers::moved)
        .def("run", &DecoderLayers::run, "first"_a, "end"_a, "x"_a, "positions"_a, "k"_a, "v"_a, "slots"_a, "kv_pos"_a,
             "kv_bias"_a, "out"_a, "mass"_a, "final_norm"_a, "head"_a, "head_packed"_a, "logits"_a, "n_threads"_a);
}

}  // namespace
