// What the extensions share: tensors and integers to the structs of the C ABI, a status to an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <stdexcept>

#include <string>
#include <utility>

#include "exchange.h"
#include "mc_kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// The library's number of a dtype, -1 where it has none.
int32_t dtype_code(const dlpack::DataType& t) {
    if (t.lanes != 1) return -1;
    switch (t.code << 8 | t.bits) {
        case 2 << 8 | 32: return MC_F32;
        case 2 << 8 | 16: return MC_F16;
        case 4 << 8 | 16: return MC_BF16;
        case 0 << 8 | 32: return MC_I32;
        case 0 << 8 | 64: return MC_I64;
        case 10 << 8 | 8: return MC_F8E4M3;
        default: return -1;
    }
}

mc_tensor as_view(const dlpack::Tensor& t) {
    mc_tensor out{};
    out.data = static_cast<char*>(t.data) + t.byte_offset;
    out.dtype = dtype_code(t.dtype);
    out.ndim = t.ndim;
    int64_t dense = 1;
    for (int32_t i = t.ndim - 1; i >= 0; --i) {
        out.size[i] = t.shape[i];
        out.stride[i] = t.strides ? t.strides[i] : dense;
        dense *= t.shape[i];
    }
    return out;
}

// Of None, of (address, dtype code, sizes, strides in elements), or of a tensor that says itself where it is (exchange.h).
mc_tensor tensor(const char* name, const py::handle& given) {
    mc_tensor out{};
    if (given.is_none()) return out;
    dlpack::Tensor seen{};
    if (!PyTuple_Check(given.ptr()) && dlpack::look(given.ptr(), &seen)) {
        if (seen.ndim > MC_MAX_DIMS) {
            throw py::value_error(std::string(name) + ": expected at most " + std::to_string(MC_MAX_DIMS) +
                                  " dimensions, got " + std::to_string(seen.ndim));
        }
        return as_view(seen);
    }
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 4) {
        throw py::type_error(std::string(name) + ": expected a tensor in memory or (address, dtype, sizes, strides)");
    }
    const auto parts = py::reinterpret_borrow<py::tuple>(given);
    const auto sizes = py::cast<py::tuple>(parts[2]), strides = py::cast<py::tuple>(parts[3]);
    if (sizes.size() != strides.size() || sizes.size() > MC_MAX_DIMS) {
        throw py::value_error(std::string(name) + ": expected as many sizes as strides, at most " +
                              std::to_string(MC_MAX_DIMS) + ", got " + std::to_string(sizes.size()) + " and " +
                              std::to_string(strides.size()));
    }
    out.data = reinterpret_cast<void*>(py::cast<uintptr_t>(parts[0]));
    out.dtype = py::cast<int32_t>(parts[1]);
    out.ndim = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
        out.size[i] = py::cast<int64_t>(sizes[i]);
        out.stride[i] = py::cast<int64_t>(strides[i]);
    }
    return out;
}

template <class T>
const T* array(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

// text: what the library that gave the status has to say of it.
void raise_with(int32_t status, const char* (*text)()) {
    if (status == MC_OK) return;
    if (status == MC_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == MC_INVALID_DTYPE) throw py::type_error(text());
    if (status == MC_DEVICE_ERROR) throw std::runtime_error(text());
    throw py::value_error(text());
}

mc_kv_splice_args splice_args(const py::handle& k, const py::handle& v, const py::handle& k_new,
                              const py::handle& v_new, const py::handle& table, int64_t n_plans, uintptr_t offsets,
                              uintptr_t rows, uintptr_t segments, uintptr_t stays, uintptr_t insert_slots,
                              uintptr_t positions, uintptr_t new_positions, int64_t inv_freq_rows, uintptr_t inv_freq,
                              int64_t half, bool interleaved, double attention_scaling) {
    mc_kv_splice_args a{};
    a.struct_size = sizeof a;
    a.k = tensor("k", k);
    a.v = tensor("v", v);
    a.k_new = tensor("k_new", k_new);
    a.v_new = tensor("v_new", v_new);
    a.table = tensor("table", table);
    a.n_plans = n_plans;
    a.offsets = array<int64_t>(offsets);
    a.rows = array<int64_t>(rows);
    a.segments = array<int64_t>(segments);
    a.stays = array<int64_t>(stays);
    a.insert_slots = array<int64_t>(insert_slots);
    a.positions = array<int64_t>(positions);
    a.new_positions = array<int64_t>(new_positions);
    a.inv_freq_rows = inv_freq_rows;
    a.inv_freq = array<double>(inv_freq);
    a.half = half;
    a.interleaved = interleaved;
    a.attention_scaling = attention_scaling;
    return a;
}

mc_gist_pool_weights pool_weights(const py::handle& w, const py::handle& b, const py::handle& m, const py::handle& c) {
    return {tensor("weights.w", w), tensor("weights.b", b), tensor("weights.m", m), tensor("weights.c", c)};
}

mc_gist_pool_args pool_args(const py::handle& k, const py::handle& v, const py::handle& w, const py::handle& b,
                            const py::handle& m, const py::handle& c, const py::handle& k_gist,
                            const py::handle& v_gist) {
    mc_gist_pool_args a{};
    a.struct_size = sizeof a;
    a.k = tensor("k", k);
    a.v = tensor("v", v);
    a.weights = pool_weights(w, b, m, c);
    a.k_gist = tensor("k_gist", k_gist);
    a.v_gist = tensor("v_gist", v_gist);
    return a;
}

mc_collapse_args collapse_args(const py::handle& k, const py::handle& v, const py::handle& w, const py::handle& b,
                               const py::handle& m, const py::handle& c, int64_t n_blocks, uintptr_t children,
                               uintptr_t gist_slots, int64_t n_segments, uintptr_t segments) {
    mc_collapse_args a{};
    a.struct_size = sizeof a;
    a.k = tensor("k", k);
    a.v = tensor("v", v);
    a.weights = pool_weights(w, b, m, c);
    a.n_blocks = n_blocks;
    a.children = array<int64_t>(children);
    a.gist_slots = array<int64_t>(gist_slots);
    a.n_segments = n_segments;
    a.segments = array<int64_t>(segments);
    return a;
}

// weights: the 18 views in the order of mc_lens_score_args.
mc_lens_score_args lens_args(const py::handle& entries, const py::handle& features, const py::handle& queries,
                             const py::tuple& weights, int64_t n_heads, uintptr_t legal, const py::handle& out) {
    using Args = mc_lens_score_args;
    static constexpr mc_tensor Args::* fields[] = {
        &Args::w_in,     &Args::read_norm,   &Args::read_q,   &Args::read_k,     &Args::read_v,   &Args::read_out,
        &Args::mlp_norm, &Args::mlp_gate_up, &Args::mlp_down, &Args::score_norm, &Args::score_q,  &Args::score_k,
        &Args::score_v,  &Args::direct,      &Args::head_in,  &Args::head_bias,  &Args::head_out, &Args::head_out_bias,
    };
    if (weights.size() != std::size(fields)) {
        throw py::value_error("weights: expected " + std::to_string(std::size(fields)) + " tensors, got " +
                              std::to_string(weights.size()));
    }
    Args a{};
    a.struct_size = sizeof a;
    a.entries = tensor("entries", entries);
    a.features = tensor("features", features);
    a.queries = tensor("queries", queries);
    for (size_t i = 0; i < weights.size(); ++i) a.*fields[i] = tensor("weights", weights[i]);
    a.n_heads = n_heads;
    a.legal = array<uint8_t>(legal);
    a.out = tensor("out", out);
    return a;
}

mc_context_attention_args attention_args(const py::handle& q, const py::handle& k, const py::handle& v, uintptr_t q_pos,
                                         uintptr_t kv_pos, uintptr_t inv_freq, int64_t half, bool interleaved,
                                         double attention_scaling, uintptr_t sigma, uintptr_t kv_bias, double scale,
                                         const py::handle& out, uintptr_t lse, uintptr_t mass, uintptr_t k_scale = 0,
                                         uintptr_t v_scale = 0) {
    mc_context_attention_args a{};
    a.struct_size = sizeof a;
    a.q = tensor("q", q);
    a.k = tensor("k", k);
    a.v = tensor("v", v);
    a.q_pos = array<int64_t>(q_pos);
    a.kv_pos = array<int64_t>(kv_pos);
    a.inv_freq = array<double>(inv_freq);
    a.half = half;
    a.interleaved = interleaved;
    a.attention_scaling = attention_scaling;
    a.sigma = array<float>(sigma);
    a.kv_bias = array<float>(kv_bias);
    a.scale = scale;
    a.out = tensor("out", out);
    a.lse = reinterpret_cast<float*>(lse);
    a.mass = reinterpret_cast<float*>(mass);
    a.k_scale = array<float>(k_scale);
    a.v_scale = array<float>(v_scale);
    return a;
}

// The 13 tensors in the order of mc_gist_encode_weights.
mc_gist_encode_weights encoder(const py::sequence& tensors, int64_t n_heads, int32_t pool, double rope_theta,
                               double target_rms) {
    mc_gist_encode_weights w{};
    w.struct_size = sizeof w;
    const std::pair<const char*, mc_tensor*> fields[] = {
        {"mu", &w.mu},
        {"w_in", &w.w_in},
        {"level_emb", &w.level_emb},
        {"attn_norm", &w.attn_norm},
        {"qkv", &w.qkv},
        {"attn_out", &w.attn_out},
        {"ffn_norm", &w.ffn_norm},
        {"gate_up", &w.gate_up},
        {"down", &w.down},
        {"final_norm", &w.final_norm},
        {"pool_q", &w.pool_q},
        {"w_out", &w.w_out},
        {"gain", &w.gain},
    };
    if (tensors.size() != std::size(fields)) throw py::value_error("weights: expected 13 tensors");
    for (size_t i = 0; i < std::size(fields); ++i) *fields[i].second = tensor(fields[i].first, tensors[i]);
    w.n_heads = n_heads;
    w.pool = pool;
    w.rope_theta = rope_theta;
    w.target_rms = target_rms;
    return w;
}

}  // namespace
