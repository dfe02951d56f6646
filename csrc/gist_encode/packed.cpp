// Layout and packing of a net's weights.
#include "packed.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace mc {
namespace {

constexpr char kMagic[8] = {'m', 'c', 'g', 'e', '0', '0', '0', '1'};

// At the beginning of the memory.
struct Header {
    char magic[8];
    int64_t type, bytes;
    Net net;
};

int64_t on_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// `count` matrices of n rows after each other, to be packed.
struct Source {
    const char* data;
    int64_t step, n;  // bytes from row to row; rows
    Panels to;
};

const char* at(const mc_tensor& x, int64_t i, int64_t j) {
    const int64_t element = i * x.stride[0] + (x.ndim > 2 ? j * x.stride[1] : 0);
    return static_cast<const char*>(x.data) + element * dtype_bytes(x.dtype);
}

// Rows [0, n) of a vector or matrix, as fp32, contiguous.
void widen(const mc_tensor& x, int64_t first, int64_t n, int64_t width, const float* out) {
    std::vector<char> panel(static_cast<size_t>(panel_bytes(kF32, width)));
    for (int64_t i = 0; i < n; ++i) {  // a panel of one row: its steps are the elements
        const char* row = x.ndim > 1 ? at(x, first + i, 0) : static_cast<const char*>(x.data);
        pack_panel(x.dtype, row, 0, 1, width, kF32, panel.data());
        for (int64_t k = 0; k < width; ++k) {
            std::memcpy(const_cast<float*>(out) + i * width + k, panel.data() + k * kPanel * 4, sizeof(float));
        }
    }
}

}  // namespace

Packed::Packed(const Net& net, int type, char* base) : net_(net), type_(type), base_(base) {
    int64_t end = on_lines(sizeof(Header));
    const auto take = [](int64_t& from, int64_t size) {
        const int64_t begin = from;
        from += on_lines(size);
        return begin;
    };
    const auto vectors = [&](int64_t& from, int64_t n) { return take(from, n * static_cast<int64_t>(sizeof(float))); };
    const auto matrix = [&](int64_t& from, int64_t n, int64_t k) {
        return take(from, panels_of(n) * panel_bytes(type, k));
    };
    mu_ = vectors(end, net.embed);
    level_emb_ = vectors(end, net.levels * net.width);
    final_norm_ = vectors(end, net.width);
    pool_q_ = vectors(end, net.gists * net.width);
    gain_ = vectors(end, 1);
    w_in_ = matrix(end, net.width, net.embed);
    w_out_ = matrix(end, net.embed, net.width);
    layers_ = end;
    int64_t of_layer = 0;
    at_.attn_norm = vectors(of_layer, net.width);
    at_.ffn_norm = vectors(of_layer, net.width);
    at_.qkv = matrix(of_layer, 3 * net.width, net.width);
    at_.out = matrix(of_layer, net.width, net.width);
    at_.gate = matrix(of_layer, net.ffn, net.width);
    at_.up = matrix(of_layer, net.ffn, net.width);
    at_.down = matrix(of_layer, net.width, net.ffn);
    at_.bytes = of_layer;
    bytes_ = layers_ + net.layers * of_layer;
}

Packed Packed::open(const void* base, int64_t bytes) {
    if (!base || reinterpret_cast<uintptr_t>(base) % 64)
        invalid("packed: expected an address that is a multiple of 64");
    Header header{};
    if (bytes >= static_cast<int64_t>(sizeof header)) std::memcpy(&header, base, sizeof header);
    if (std::memcmp(header.magic, kMagic, sizeof kMagic)) {
        invalid("packed: expected what mc_gist_encode_pack_cpu of this version has written");
    }
    const Packed out(header.net, static_cast<int>(header.type), static_cast<char*>(const_cast<void*>(base)));
    if (header.bytes != bytes || out.bytes() != bytes) {
        invalid("packed: expected " + std::to_string(header.bytes) + " bytes, got " + std::to_string(bytes));
    }
    return out;
}

const float* Packed::level(int64_t level) const {
    return floats(level_emb_) + (std::min(level, net_.levels) - 1) * net_.width;
}

LayerWeights Packed::layer(int64_t i) const {
    const int64_t from = layers_ + i * at_.bytes, width = net_.width;
    return {floats(from + at_.attn_norm),
            floats(from + at_.ffn_norm),
            panels(from + at_.qkv, 3 * width, width),
            panels(from + at_.out, width, width),
            panels(from + at_.gate, net_.ffn, width),
            panels(from + at_.up, net_.ffn, width),
            panels(from + at_.down, width, net_.ffn)};
}

void Packed::pack(const mc_gist_encode_weights& w, int n_threads) const {
    const int dtype = w.w_in.dtype;
    std::vector<Source> sources;
    const auto add = [&](const mc_tensor& x, int64_t layer, int64_t first, const Panels& to) {
        const int rows = x.ndim - 2;
        const char* from = rows ? at(x, layer, first) : at(x, first, 0);
        sources.push_back({from, x.stride[rows] * dtype_bytes(dtype), to.n, to});
    };
    add(w.w_in, 0, 0, w_in());
    add(w.w_out, 0, 0, w_out());
    for (int64_t i = 0; i < net_.layers; ++i) {
        const LayerWeights to = layer(i);
        widen(w.attn_norm, i, 1, net_.width, to.attn_norm);
        widen(w.ffn_norm, i, 1, net_.width, to.ffn_norm);
        add(w.qkv, i, 0, to.qkv);
        add(w.attn_out, i, 0, to.out);
        add(w.gate_up, i, 0, to.gate);
        add(w.gate_up, i, net_.ffn, to.up);
        add(w.down, i, 0, to.down);
    }
    widen(w.mu, 0, 1, net_.embed, mu());
    widen(w.level_emb, 0, net_.levels, net_.width, floats(level_emb_));
    widen(w.final_norm, 0, 1, net_.width, final_norm());
    widen(w.pool_q, 0, net_.gists, net_.width, pool_q(0));
    widen(w.gain, 0, 1, 1, floats(gain_));
    std::vector<std::pair<size_t, int64_t>> tasks;
    for (size_t s = 0; s < sources.size(); ++s) {
        for (int64_t j = 0; j < panels_of(sources[s].n); ++j) tasks.emplace_back(s, j);
    }
    auto pack_one = [&](int64_t i) {
        const Source& from = sources[tasks[static_cast<size_t>(i)].first];
        const int64_t j = tasks[static_cast<size_t>(i)].second, first = j * kPanel;
        pack_panel(dtype, from.data + first * from.step, from.step, std::min(kPanel, from.n - first), from.to.k, type_,
                   const_cast<char*>(from.to.data) + j * from.to.bytes);
    };
    parallel_for(static_cast<int64_t>(tasks.size()), n_threads, pack_one);
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.type = type_;
    header.bytes = bytes_;
    header.net = net_;
    std::memcpy(base_, &header, sizeof header);
}

}  // namespace mc
