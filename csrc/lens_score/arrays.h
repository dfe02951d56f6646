// Memory of a call, and rows of the caller's tensors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lens.h"
#include "scratch.h"
#include "tensor.h"

namespace mc {

// Floats that start at a cache line, zeros at first.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t n, bool zero = true) : data_(n) {
        if (zero) std::fill(data_.get(), data_.get() + n, 0.0f);
    }
    float* get() const { return data_.get(); }

private:
    Scratch<float> data_;
};

// Rows of floats that end in zeros up to a multiple of `pad`.
struct Rows {
    int64_t count, size, step;
    Buffer buffer;

    Rows(int64_t count_, int64_t size_, int64_t pad = kPad)
        : count(count_), size(size_), step(round_up(size_, pad)), buffer(count_ * step) {}
    float* at(int64_t row) const { return buffer.get() + row * step; }
};

struct Matrix {
    const char* data;
    int64_t step;  // bytes
    const char* row(int64_t i) const { return data + i * step; }
};

inline int64_t bytes_to(const mc_tensor& x, int dim) { return x.stride[dim] * dtype_bytes(x.dtype); }

// The last two dimensions; `pass`: index of the first of three.
inline Matrix matrix(const mc_tensor& x, int64_t pass = 0) {
    const char* data = static_cast<const char*>(x.data);
    if (x.ndim == 2) return {data, bytes_to(x, 0)};
    return {data + pass * bytes_to(x, 0), bytes_to(x, 1)};
}

}  // namespace mc
