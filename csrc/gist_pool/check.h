// The arguments of gist_pool and collapse, checked, and what follows from them for addressing.
#pragma once

#include "gist.h"
#include "tensor.h"

namespace mc {

// Sizes, and where the weights of a layer and head lie.
struct Pooling {
    int dtype, weights_dtype;
    int64_t layers, heads, gists, count, dims;
    const char *w, *b, *m, *c;
    int64_t w_stride[3], b_stride[3], m_stride[3], c_stride[2];  // bytes: layer, head, gist or row

    int64_t width() const { return 2 * dims; }
    int64_t row_bytes() const { return dims * dtype_bytes(dtype); }
};

void byte_strides(const mc_tensor& x, int n, int64_t* out);

// Throw Error for whatever the ABI promises to refuse. Nothing has been written then.
Pooling check_gist_pool(const mc_gist_pool_args& a);
Pooling check_collapse(const mc_collapse_args& a);

}  // namespace mc
