// The steps of the net. Every product writes or adds to whole columns of panels; what is between them works on rows.
#include "windows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mc {
namespace {

constexpr int64_t kFloat = sizeof(float);
// Where all rows of a call meet a panel at once it comes from memory: so far ahead of what is multiplied it is asked for.
constexpr int64_t kStreamAhead = 8 << 10;

const EncodeOps& encode_ops(const RowOps& rows) {
    return ops_beside(rows, "gist_encode", {encode_avx512(), encode_avx2(), encode_neon(), encode_scalar()});
}

// Floats from row to row: whole cache lines, an odd number of them (as product_row_bytes, and for its reason).
int64_t odd_lines(int64_t floats) { return product_row_bytes(kF32, floats) / kFloat; }

// Elements of a product's row, with the zeros that it ends in.
int64_t padded(int type, int64_t n) { return product_steps(type, n) * 4 / dtype_bytes(type); }

int64_t wide_bytes(const Net& net, int type) {
    return std::max(
        {product_row_bytes(type, net.embed), odd_lines(3 * net.width) * kFloat, product_row_bytes(type, net.ffn)});
}

}  // namespace

Encoding::Encoding(const mc_gist_encode_args& args_, const Packed& weights_, const IsaLevel& level_)
    : args(args_), weights(weights_), level(level_), ops(encode_ops(*level_.rows)) {
    const Net& net = weights.net();
    entries = embeddings() + (net.pool == Pool::kCls);
    const int64_t dim = net.head_dim(), half = dim / 2;
    std::vector<double> turns(static_cast<size_t>(half));
    for (int64_t b = 0; b < half; ++b) {
        const double exponent = -static_cast<double>(2 * b) / static_cast<double>(dim);
        turns[static_cast<size_t>(b)] = std::pow(net.rope_theta, exponent) / 6.283185307179586476925;
    }
    phases.resize(static_cast<size_t>(entries * dim));
    for (int64_t j = 0; j < entries; ++j) {
        level.rows->phases(turns.data(), half, j, 1.0, false, phases.data() + j * dim);
    }
}

int64_t Encoding::window_bytes() const {
    const Net& net = weights.net();
    return entries * (odd_lines(net.width) * kFloat + product_row_bytes(weights.type(), net.width) +
                      wide_bytes(net, weights.type()));
}

ItemScratch::ItemScratch(const Encoding& e, int64_t group) {
    const Net& net = e.weights.net();
    const int64_t dim = net.head_dim(), t = e.entries;
    head_step = odd_lines(whole_panels(dim));
    scores_step = odd_lines(whole_panels(t));
    keys_panel = panel_bytes(kF32, dim);
    s_step = odd_lines(net.width);
    sum = Scratch<float>(2 * net.embed);
    q = Scratch<float>(t * head_step);
    k = Scratch<float>(t * head_step);
    keys = Scratch<char>(panels_of(t) * keys_panel);
    scores = Scratch<float>(t * scores_step);
    attended = Scratch<float>(t * head_step);
    gate_up = Scratch<float>(group * t * 2 * kPanel);
    s = Scratch<float>(t * s_step);
    p = Scratch<float>(t);
    pooled = Scratch<float>(net.width);
}

Windows::Windows(const Encoding& e, int64_t batch, int64_t group, bool shared)
    : e_(e), type_(e.weights.type()), fetches_(e.level.matmul->outruns_memory), shared_(shared) {
    const Net& net = e.weights.net();
    const int64_t rows = group * e.entries;
    h_step_ = odd_lines(net.width);
    z_step_ = odd_lines(net.embed);
    qkv_step_ = odd_lines(3 * net.width);
    x_step_ = product_row_bytes(type_, net.embed);
    a_step_ = product_row_bytes(type_, net.width);
    act_step_ = product_row_bytes(type_, net.ffn);
    h_ = Scratch<float>(rows * h_step_);
    z_ = Scratch<float>(batch * net.gists * z_step_);
    a_ = Scratch<char>(rows * a_step_);
    pooled_ = Scratch<char>(batch * net.gists * a_step_);
    wide_ = Scratch<char>(rows * wide_bytes(net, type_) + kPanel * kFloat);  // a panel's columns of the last values
}

void Windows::begin_batch(int64_t first, int64_t count) {
    batch_first_ = first;
    batch_count_ = count;
}

void Windows::begin_group(int64_t first, int64_t count) {
    group_first_ = first;
    group_count_ = count;
}

float* Windows::z_row(int64_t window, int64_t g) const { return z_.get() + pooled_row(window, g) * z_step_; }

int64_t Windows::pooled_row(int64_t window, int64_t g) const {
    return (group_first_ - batch_first_ + window) * e_.weights.net().gists + g;
}

int64_t Windows::group_items(int step) const {
    const Net& net = e_.weights.net();
    if (step == 0 || step == group_steps() - 1) return group_count_;
    if (step == 1) return panels_of(net.width);
    switch ((step - 2) % kLayerSteps) {
        case kAttnNorm:
        case kFfnNorm:
            return (rows() + kNormRows - 1) / kNormRows;
        case kQkv:
            return panels_of(3 * net.width);
        case kAttend:
            return group_count_ * net.heads;
        case kGateUp:
            return panels_of(net.ffn);
        default:
            return panels_of(net.width);
    }
}

void Windows::group_item(int step, int64_t i, ItemScratch& s) {
    const Packed& weights = e_.weights;
    if (step == 0) return read(i, s);
    if (step == 1) return multiply(weights.w_in(), i, wide_.get(), x_step_, rows(), h_.get(), h_step_, true);
    if (step == group_steps() - 1) return pool(i, s);
    const LayerWeights w = weights.layer((step - 2) / kLayerSteps);
    float* wide = reinterpret_cast<float*>(wide_.get());
    switch ((step - 2) % kLayerSteps) {
        case kAttnNorm:
            return norm(i, w.attn_norm);
        case kQkv:
            return multiply(w.qkv, i, a_.get(), a_step_, rows(), wide, qkv_step_, false);
        case kAttend:
            return attend(i, s);
        case kAttnOut:
            return multiply(w.out, i, a_.get(), a_step_, rows(), h_.get(), h_step_, true);
        case kFfnNorm:
            return norm(i, w.ffn_norm);
        case kGateUp:
            return gate_up(i, w, s);
        default:
            return multiply(w.down, i, wide_.get(), act_step_, rows(), h_.get(), h_step_, true);
    }
}

int64_t Windows::batch_items(int step) const { return step == 0 ? panels_of(e_.weights.net().embed) : gists(); }

void Windows::batch_item(int step, int64_t i) {
    if (step == 0) return multiply(e_.weights.w_out(), i, pooled_.get(), a_step_, gists(), z_.get(), z_step_, true);
    finish(i);
}

Product Windows::product(const Panels& w, int64_t panel, const char* a, int64_t a_step, int64_t rows) const {
    Product p{};
    p.a = a;
    p.a_step = a_step;
    p.m = rows;
    p.w = w.data + panel * w.bytes;
    p.w_step = kPanel * 4;
    p.steps = product_steps(type_, w.k);
    p.n = std::min(kPanel, w.n - panel * kPanel);
    if (fetches_) {
        p.next = p.w + (shared_ ? kStreamAhead : w.bytes);
        p.next_step = p.w_step;
    }
    return p;
}

void Windows::multiply(const Panels& w, int64_t panel, const char* a, int64_t a_step, int64_t rows, float* c,
                       int64_t c_step, bool add) const {
    Product p = product(w, panel, a, a_step, rows);
    p.c = c + panel * kPanel;
    p.c_step = c_step;
    p.add = add;
    e_.level.matmul->multiply[type_](p);
}

// Rows of a window at unit RMS; what the products will be added to: the level's embedding, the centred mean.
void Windows::read(int64_t window, ItemScratch& s) {
    const Net& net = e_.weights.net();
    const mc_tensor& x = e_.args.blocks;
    const int64_t bytes = dtype_bytes(x.dtype), k = e_.embeddings();
    const char* from = static_cast<const char*>(x.data) + (group_first_ + window) * x.stride[0] * bytes;
    char* to = wide_.get() + window * e_.entries * x_step_;
    float *h = h_.get() + window * e_.entries * h_step_, *sum = s.sum.get();
    const float* level = e_.weights.level(e_.args.level);
    std::fill(sum, sum + 2 * net.embed, 0.0f);
    for (int64_t j = 0; j < e_.entries; ++j, to += x_step_, h += h_step_) {
        std::copy(level, level + net.width, h);
        if (j < k) {
            const char* row = from + j * x.stride[1] * bytes;
            e_.ops.normalise[x.dtype][type_](
                {row, net.embed, nullptr, 1.0f, sum, sum + net.embed, to, padded(type_, net.embed)});
        } else {
            std::memset(to, 0, static_cast<size_t>(x_step_));
            for (int64_t i = 0; i < net.width; ++i) h[i] += e_.weights.pool_q(0)[i];
        }
    }
    const float* mu = e_.weights.mu();
    for (int64_t i = 0; i < net.embed; ++i) {
        sum[i] = sum[i] / static_cast<float>(k) - (e_.args.level == 1 ? mu[i] : 0.0f);
    }
    for (int64_t g = 0; g < net.gists; ++g) {
        e_.ops.normalise[kF32][kF32]({reinterpret_cast<const char*>(sum), net.embed, nullptr,
                                      static_cast<float>(net.target_rms), nullptr, nullptr,
                                      reinterpret_cast<char*>(z_row(window, g)), net.embed});
    }
}

void Windows::norm(int64_t i, const float* gain) {
    const int64_t width = e_.weights.net().width, end = std::min((i + 1) * kNormRows, rows());
    for (int64_t r = i * kNormRows; r < end; ++r) {
        const char* row = reinterpret_cast<const char*>(h_.get() + r * h_step_);
        e_.ops.normalise[kF32][type_](
            {row, width, gain, 1.0f, nullptr, nullptr, a_.get() + r * a_step_, padded(type_, width)});
    }
}

// One head of one window, in fp32: keys become a packed W, values lie as a panel already.
void Windows::attend(int64_t i, ItemScratch& s) {
    const Net& net = e_.weights.net();
    const int64_t t = e_.entries, dim = net.head_dim(), head = i % net.heads, row = i / net.heads * t;
    const auto product = e_.level.matmul->multiply[kF32];
    const float* q = reinterpret_cast<const float*>(wide_.get()) + row * qkv_step_ + head * dim;
    const float *k = q + net.width, *v = k + net.width;
    const auto turn = [&](const float* from, float* to) {
        e_.level.rows->rotate[kF32][0]({reinterpret_cast<const char*>(from), reinterpret_cast<char*>(to), t,
                                        qkv_step_ * kFloat, s.head_step * kFloat, e_.phases.data(), dim, dim / 2, 0,
                                        1.0f, 1, 0, 0});
    };
    turn(q, s.q.get());
    turn(k, s.k.get());
    for (int64_t j = 0; j < t; j += kPanel) {
        const int64_t n = std::min(kPanel, t - j);
        char* panel = s.keys.get() + j / kPanel * s.keys_panel;
        pack_panel(kF32, reinterpret_cast<const char*>(s.k.get() + j * s.head_step), s.head_step * kFloat, n, dim, kF32,
                   panel);
        product({reinterpret_cast<const char*>(s.q.get()), s.head_step * kFloat, t, panel, kPanel * kFloat, dim,
                 s.scores.get() + j, s.scores_step, n, false});
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
    for (int64_t j = 0; j < t; ++j) e_.ops.softmax(s.scores.get() + j * s.scores_step, t, scale);
    for (int64_t d = 0; d < dim; d += kPanel) {
        product({reinterpret_cast<const char*>(s.scores.get()), s.scores_step * kFloat, t,
                 reinterpret_cast<const char*>(v + d), qkv_step_ * kFloat, t, s.attended.get() + d, s.head_step,
                 std::min(kPanel, dim - d), false});
    }
    for (int64_t j = 0; j < t; ++j) {
        e_.ops.store[type_](s.attended.get() + j * s.head_step, dim,
                            a_.get() + (row + j) * a_step_ + head * dim * dtype_bytes(type_));
    }
}

void Windows::gate_up(int64_t panel, const LayerWeights& w, ItemScratch& s) {
    const int64_t n = rows(), bytes = dtype_bytes(type_);
    // Columns beyond F are products with zeros: what a row has to end in.
    const int64_t columns = std::min(kPanel, padded(type_, w.gate.n) - panel * kPanel);
    float* both = s.gate_up.get();
    const auto half = [&](const Panels& of, float* c) {
        Product p = product(of, panel, a_.get(), a_step_, n);
        p.n = kPanel;
        p.c = c;
        p.c_step = 2 * kPanel;
        e_.level.matmul->multiply[type_](p);
    };
    half(w.gate, both);
    half(w.up, both + kPanel);
    char* out = wide_.get() + panel * kPanel * bytes;
    for (int64_t r = 0; r < n; ++r, both += 2 * kPanel, out += act_step_) {
        e_.ops.gated[type_](both, both + kPanel, columns, out);
    }
}

void Windows::pool(int64_t window, ItemScratch& s) {
    const Net& net = e_.weights.net();
    const int64_t t = e_.entries, first = net.pool == Pool::kCls ? t - 1 : 0;
    for (int64_t j = first; j < t; ++j) {
        const char* row = reinterpret_cast<const char*>(h_.get() + (window * t + j) * h_step_);
        e_.ops.normalise[kF32][kF32]({row, net.width, e_.weights.final_norm(), 1.0f, nullptr, nullptr,
                                      reinterpret_cast<char*>(s.s.get() + j * s.s_step), net.width});
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(net.width)));
    for (int64_t g = 0; g < net.gists; ++g) {
        const float* query = net.pool == Pool::kSoftmax ? e_.weights.pool_q(g) : nullptr;
        e_.ops.pool(
            {s.s.get() + first * s.s_step, s.s_step, t - first, net.width, query, scale, s.p.get(), s.pooled.get()});
        char* out = pooled_.get() + pooled_row(window, g) * a_step_;
        std::memset(out, 0, static_cast<size_t>(a_step_));
        e_.ops.store[type_](s.pooled.get(), net.width, out);
    }
}

void Windows::finish(int64_t row) {
    const Net& net = e_.weights.net();
    const mc_tensor& out = e_.args.out;
    const int64_t element = (batch_first_ + row / net.gists) * out.stride[0] + row % net.gists * out.stride[1];
    e_.ops.normalise[kF32][out.dtype]({reinterpret_cast<const char*>(z_.get() + row * z_step_), net.embed, nullptr,
                                       e_.weights.gain() * static_cast<float>(net.target_rms), nullptr, nullptr,
                                       static_cast<char*>(out.data) + element * dtype_bytes(out.dtype), net.embed});
}

}  // namespace mc
