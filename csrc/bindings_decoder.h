// decoder_layers for Python: an object that holds the views of a decoder's weights, and the call; packed weights.
#pragma once

#include <iterator>
#include <string>
#include <vector>

#include "bindings.h"

namespace {

// (address, bits), or None.
mc_packed_weight packed_weight(const py::handle& given) {
    if (given.is_none()) return {};
    const auto parts = py::cast<py::tuple>(given);
    if (parts.size() != 2) throw py::value_error("packed: expected (address, bits)");
    return {reinterpret_cast<const void*>(py::cast<uintptr_t>(parts[0])), py::cast<int32_t>(parts[1])};
}

// The views stay valid only as long as the tensors do: that is the caller's duty.
class DecoderLayers {
public:
    // Of each layer: 10 views and 4 packed weights, or None, in the order of mc_decoder_layer.
    explicit DecoderLayers(const py::sequence& layers) {
        using Layer = mc_decoder_layer;
        static constexpr mc_tensor Layer::* fields[] = {
            &Layer::attention_norm, &Layer::qkv,      &Layer::qkv_bias, &Layer::q_norm,  &Layer::k_norm,
            &Layer::out,            &Layer::out_bias, &Layer::ffn_norm, &Layer::gate_up, &Layer::down,
        };
        static constexpr mc_packed_weight Layer::* packed[] = {
            &Layer::qkv_packed, &Layer::out_packed, &Layer::gate_up_packed, &Layer::down_packed,
        };
        constexpr size_t n_views = std::size(fields), n_given = n_views + std::size(packed);
        for (const auto& given : layers) {
            const auto views = py::cast<py::tuple>(given);
            if (views.size() != n_given) {
                throw py::value_error("layers: expected " + std::to_string(n_given) + " weights each, got " +
                                      std::to_string(views.size()));
            }
            Layer layer{};
            for (size_t i = 0; i < n_views; ++i) layer.*fields[i] = tensor("layers", views[i]);
            for (size_t i = n_views; i < n_given; ++i) layer.*packed[i - n_views] = packed_weight(views[i]);
            layers_.push_back(layer);
        }
    }

    // Layers [first, end) run.
    void run(int64_t first, int64_t end, double eps, const py::handle& x, uintptr_t positions, const py::handle& k,
             const py::handle& v, uintptr_t slots, int64_t used, uintptr_t kv_pos, uintptr_t kv_bias, uintptr_t inv_freq,
             int64_t half, bool interleaved, double attention_scaling, double scale, const py::handle& out,
             uintptr_t mass, int32_t n_threads, const py::handle& final_norm) const {
        if (first < 0 || first > end || end > static_cast<int64_t>(layers_.size())) {
            throw py::value_error("layers: expected a range within 0.." + std::to_string(layers_.size()) + ", got " +
                                  std::to_string(first) + ".." + std::to_string(end));
        }
        mc_decoder_layers_args a{};
        a.struct_size = sizeof a;
        a.layer_size = sizeof(mc_decoder_layer);
        a.n_layers = end - first;
        a.layers = layers_.data() + first;
        a.eps = eps;
        a.final_norm = tensor("final_norm", final_norm);
        a.x = tensor("x", x);
        a.positions = array<int64_t>(positions);
        a.k = tensor("k", k);
        a.v = tensor("v", v);
        a.slots = array<int64_t>(slots);
        a.used = used;
        a.kv_pos = array<int64_t>(kv_pos);
        a.kv_bias = array<float>(kv_bias);
        a.inv_freq = array<double>(inv_freq);
        a.half = half;
        a.interleaved = interleaved;
        a.attention_scaling = attention_scaling;
        a.scale = scale;
        a.out = tensor("out", out);
        a.mass = reinterpret_cast<float*>(mass);
        int32_t status;
        {
            py::gil_scoped_release release;
            status = mc_decoder_layers_cpu(&a, n_threads);
        }
        raise_with(status, mc_last_error);
    }

private:
    std::vector<mc_decoder_layer> layers_;
};

void define_decoder_layers(py::module_& m) {
    py::class_<DecoderLayers>(m, "DecoderLayers")
        .def(py::init<const py::sequence&>(), "layers"_a)
        .def("run", &DecoderLayers::run, "first"_a, "end"_a, "eps"_a, "x"_a, "positions"_a, "k"_a, "v"_a, "slots"_a,
             "used"_a, "kv_pos"_a, "kv_bias"_a, "inv_freq"_a, "half"_a, "interleaved"_a, "attention_scaling"_a,
             "scale"_a, "out"_a, "mass"_a, "n_threads"_a, "final_norm"_a);
}

}  // namespace
