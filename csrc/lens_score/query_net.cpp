// Weights are read once, by products that threads share by outputs; absorbing them costs Q multiply-adds an element.
#include "query_net.h"

#include <cmath>
#include <vector>

#include "net.h"

namespace mc {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

const char* pairs_data(const Buffer& x) { return reinterpret_cast<const char*>(x.get()); }

}  // namespace

// For products with so many inputs: by matrix tiles, which take whole steps; or NULL.
const MatmulOps* QueryNet::net_matmul(int64_t inputs) const {
    return on_matrix_tiles(matmul_) && inputs % (2 * kTileSteps) == 0 ? matmul_ : nullptr;
}

// Room for rows of so many inputs as products on matrix tiles take them, nothing where there are none.
Buffer QueryNet::room_for_pairs(int64_t inputs) const {
    return net_matmul(inputs) ? Buffer(panel_bytes(kBF16, inputs) / 4, false) : Buffer();
}

void QueryNet::pair(const float* x, int64_t step, int64_t inputs, const Buffer& out) const {
    if (out.get()) ops_.pair_rows(x, step, x_.queries, inputs, reinterpret_cast<char*>(out.get()));
}

// out[m] (+)= w x[m]
void QueryNet::linear(const Rows& x, const Matrix& w, int64_t outputs, const Rows& out, bool add) const {
    Buffer fresh;
    if (add) fresh = Buffer(x.count * out.step, false);
    float* to = add ? fresh.get() : out.at(0);
    const Buffer pairs = room_for_pairs(x.size);
    pair(x.at(0), x.step, x.size, pairs);
    threads_.split(outputs, kPad, x.count * x.size * outputs, [&](int64_t first, int64_t end) {
        const Linear l{x.at(0),     x.step,     x.count,  w.row(first),       w.step,           x.size,
                       end - first, to + first, out.step, net_matmul(x.size), pairs_data(pairs)};
        ops_.linear[x_.weight_dtype](l);
    });
    for (int64_t m = 0; add && m < x.count; ++m) {
        for (int64_t i = 0; i < outputs; ++i) out.at(m)[i] += to[m * out.step + i];
    }
}

Rows QueryNet::widened(const mc_tensor& x, int dtype, int64_t rows, int64_t size) const {
    Rows out(rows, size);
    const Matrix m = x.ndim == 1 ? Matrix{static_cast<const char*>(x.data), 0} : matrix(x);
    for (int64_t i = 0; i < rows && size; ++i) ops_.widen[dtype](m.row(i), size, out.at(i));
    return out;
}

Rows QueryNet::normed(const Rows& x, const mc_tensor& gains, int64_t pass) const {
    Rows gain(1, x.size);
    const int64_t skip = gains.ndim == 2 ? pass * bytes_to(gains, 0) : 0;
    ops_.widen[x_.weight_dtype](static_cast<const char*>(gains.data) + skip, x.size, gain.at(0));
    return mc::normed(x, gain.at(0));
}

Rows QueryNet::bring_in() const {
    Rows z(x_.queries, x_.width);
    linear(mc::normed(widened(a_.queries, x_.dtype, x_.queries, x_.dims), nullptr), matrix(a_.w_in), x_.width, z);
    return z;
}

// Queries [Q, d] become the vectors [H * Q, E] that meet the entries: those of head h are w[h]^T q[h] / sqrt(d/H), in
// units of log 2.
void QueryNet::absorb(const Rows& q, const Matrix& w, const Rows& out) const {
    const int64_t per_head = x_.head_dim();
    const float scale = static_cast<float>(kLog2E / std::sqrt(static_cast<double>(per_head)));
    for (int64_t i = 0; i < q.count * q.step; ++i) q.at(0)[i] *= scale;
    const int64_t element = dtype_bytes(x_.weight_dtype);
    threads_.split(x_.dims, kStrip, q.count * x_.width * x_.dims, [&](int64_t first, int64_t end) {
        for (int64_t h = 0; h < x_.heads; ++h) {
            const Absorb one{q.at(0) + h * per_head,
                             q.step,
                             x_.queries,
                             w.row(h * per_head) + first * element,
                             w.step,
                             per_head,
                             end - first,
                             out.at(h * x_.queries) + first,
                             out.step,
                             x_.dims % (2 * kTileSteps) ? nullptr : net_matmul(per_head)};
            ops_.absorb[x_.weight_dtype](one);
        }
    });
}

void QueryNet::read_vectors(const Rows& z, int64_t pass, const Rows& vectors) const {
    const Rows q(x_.queries, x_.width);
    linear(normed(z, a_.read_norm, pass), matrix(a_.read_q, pass), x_.width, q);
    absorb(q, matrix(a_.read_k, pass), vectors);
}

void QueryNet::apply_values(const Rows& z, const Rows& context, int64_t pass) const {
    const Rows values(x_.queries, x_.width);
    const Matrix w = matrix(a_.read_v, pass);
    const int64_t per_head = x_.head_dim();
    std::vector<Buffer> pairs;
    for (int64_t h = 0; h < x_.heads; ++h) pairs.push_back(room_for_pairs(x_.dims));
    threads_.split(x_.heads, 1, x_.vectors() * x_.dims * 8, [&](int64_t first, int64_t end) {
        for (int64_t h = first; h < end; ++h) {
            pair(context.at(h * x_.queries), context.step, x_.dims, pairs[static_cast<size_t>(h)]);
        }
    });
    threads_.split(x_.width, 1, x_.queries * x_.width * x_.dims, [&](int64_t first, int64_t end) {
        for (int64_t at = first; at < end;) {
            const int64_t h = at / per_head, stop = std::min(end, (h + 1) * per_head);
            const Linear l{context.at(h * x_.queries),
                           context.step,
                           x_.queries,
                           w.row(at),
                           w.step,
                           x_.dims,
                           stop - at,
                           values.at(0) + at,
                           values.step,
                           net_matmul(x_.dims),
                           pairs_data(pairs[static_cast<size_t>(h)])};
            ops_.linear[x_.weight_dtype](l);
            at = stop;
        }
    });
    linear(values, matrix(a_.read_out, pass), x_.width, z, true);
}

void QueryNet::mlp(const Rows& z, int64_t pass) const {
    Rows both(x_.queries, 2 * x_.ffn), hidden(x_.queries, x_.ffn);
    linear(normed(z, a_.mlp_norm, pass), matrix(a_.mlp_gate_up, pass), 2 * x_.ffn, both);
    for (int64_t m = 0; m < x_.queries; ++m) {
        const float *gate = both.at(m), *up = gate + x_.ffn;
        for (int64_t i = 0; i < x_.ffn; ++i) hidden.at(m)[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
    linear(hidden, matrix(a_.mlp_down, pass), x_.width, z, true);
}

void QueryNet::score_vectors(const Rows& z, const Rows& vectors, const Rows& values) const {
    const Rows s = normed(z, a_.score_norm, 0), keys(x_.queries, x_.width);
    linear(s, matrix(a_.score_k), x_.width, keys);
    linear(s, matrix(a_.score_v), x_.heads * x_.head_values, values);
    absorb(keys, matrix(a_.score_q), vectors);
    const Matrix direct = matrix(a_.direct);
    for (int64_t j = 0; j < x_.direct; ++j) {
        ops_.widen[x_.weight_dtype](direct.row(j), x_.dims, vectors.at(x_.vectors() + j));
    }
}

}  // namespace mc
