// The small net beside the passes over entries: all that is of a query's size.
#pragma once

#include "arrays.h"
#include "check.h"
#include "threads.h"

namespace mc {

inline bool on_matrix_tiles(const MatmulOps* matmul) { return matmul && matmul->outruns_memory; }

class QueryNet {
public:
    // matmul: NULL where products are fp32.
    QueryNet(const mc_lens_score_args& a, const Lens& x, const LensOps& ops, const MatmulOps* matmul, Threads threads)
        : a_(a), x_(x), ops_(ops), matmul_(matmul), threads_(threads) {}

    // z [Q, d]
    Rows bring_in() const;
    // The vectors [H * Q, E] that meet the entries in a read pass.
    void read_vectors(const Rows& z, int64_t pass, const Rows& vectors) const;
    // z += read_out concat_h(read_v[h] context[h, m])
    void apply_values(const Rows& z, const Rows& context, int64_t pass) const;
    void mlp(const Rows& z, int64_t pass) const;
    // The vectors [H * Q + J, E] that meet the entries in the score pass, and the queries' values [Q, H dv].
    void score_vectors(const Rows& z, const Rows& vectors, const Rows& values) const;

    // A weight [rows, size] in fp32.
    Rows widened(const mc_tensor& weight, int64_t rows, int64_t size) const {
        return widened(weight, x_.weight_dtype, rows, size);
    }

private:
    const MatmulOps* net_matmul(int64_t inputs) const;
    Buffer room_for_pairs(int64_t inputs) const;
    void pair(const float* x, int64_t step, int64_t inputs, const Buffer& out) const;
    void linear(const Rows& x, const Matrix& w, int64_t outputs, const Rows& out, bool add = false) const;
    Rows widened(const mc_tensor& x, int dtype, int64_t rows, int64_t size) const;
    Rows normed(const Rows& x, const mc_tensor& gains, int64_t pass) const;
    void absorb(const Rows& q, const Matrix& w, const Rows& out) const;

    const mc_lens_score_args& a_;
    const Lens& x_;
    const LensOps& ops_;
    const MatmulOps* const matmul_;
    const Threads threads_;
};

}  // namespace mc
