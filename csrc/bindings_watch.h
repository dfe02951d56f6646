// Whether tensors that were looked at once are what they were: where they lie, and what is in them.
#pragma once

#include <cstring>
#include <vector>

#include "bindings.h"

namespace {

// A tensor, and where and what it was when it was looked at.
class Watched {
public:
    explicit Watched(py::handle given) : given_(py::reinterpret_borrow<py::object>(given)) {
        if (!dlpack::look(given_.ptr(), &was_) || (was_.ndim && !was_.strides)) {
            throw py::type_error("layers: expected tensors that lie in memory");
        }
        sizes_.assign(was_.shape, was_.shape + was_.ndim);
        strides_.assign(was_.strides, was_.strides + was_.ndim);
    }

    bool moved() const {
        dlpack::Tensor now{};
        if (!dlpack::look(given_.ptr(), &now)) return true;
        const size_t bytes = sizes_.size() * sizeof(int64_t);
        return now.data != was_.data || now.byte_offset != was_.byte_offset || now.ndim != was_.ndim ||
               std::memcmp(&now.dtype, &was_.dtype, sizeof now.dtype) ||
               std::memcmp(&now.device, &was_.device, sizeof now.device) ||
               std::memcmp(now.shape, sizes_.data(), bytes) || std::memcmp(now.strides, strides_.data(), bytes);
    }

    // Brings near what `moved` will look at: the object, and what stands around its sizes.
    void fetch() const {
        __builtin_prefetch(given_.ptr());
        const char* around = reinterpret_cast<const char*>(was_.shape);
        for (int line = -1; line <= 1; ++line) __builtin_prefetch(around + 64 * line);
    }

private:
    py::object given_;
    dlpack::Tensor was_{};  // its sizes and strides are the tensor's own, which may change
    std::vector<int64_t> sizes_, strides_;
};

// A tensor whose values are counted: `_version` grows with each change.
class Counted {
public:
    explicit Counted(py::handle given) : given_(py::reinterpret_borrow<py::object>(given)), was_(version()) {}
    bool changed() const { return version() != was_; }

private:
    int64_t version() const {
        static PyObject* name = PyUnicode_InternFromString("_version");
        const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(given_.ptr(), name));
        if (!value) throw py::error_already_set();
        return py::cast<int64_t>(value);
    }

    py::object given_;
    int64_t was_;
};

}  // namespace
