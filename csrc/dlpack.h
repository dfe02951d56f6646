// Arrays of other Python libraries by DLPack (https://dmlc.github.io/dlpack): where a capsule's memory is, and a capsule
// for memory of ours. The structures are the protocol's own, of its versions 0 (unversioned) and 1.
//
// A capsule is read without being consumed: as long as it lives its producer keeps the memory, and if nobody takes it
// over it frees what it holds when it goes. Callers keep the capsule until the call is done.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dlpack {

struct Device {
    int32_t type, id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null: C order
    uint64_t byte_offset;
};

struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};

struct ManagedVersioned {
    uint32_t major, minor;
    void* context;
    void (*deleter)(ManagedVersioned*);
    uint64_t flags;
    Tensor tensor;
};

constexpr int32_t kCpu = 1;
constexpr uint64_t kReadOnly = 1;
constexpr const char *kName = "dltensor", *kVersionedName = "dltensor_versioned";

namespace py = pybind11;

inline py::tuple to_tuple(const int64_t* values, int32_t n) {
    py::tuple out(n);
    for (int32_t i = 0; i < n; ++i) out[i] = values[i];
    return out;
}

// (address, dtype code, bits, lanes, sizes, strides in elements, whether it says that it may be written). A capsule
// without a version says nothing of that: None.
inline py::tuple read(const py::object& capsule) {
    const Tensor* t = nullptr;
    py::object writable = py::none();
    if (PyCapsule_IsValid(capsule.ptr(), kVersionedName)) {
        const auto* m = static_cast<ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kVersionedName));
        if (m->major != 1) throw py::value_error("expected DLPack 1, got version " + std::to_string(m->major));
        t = &m->tensor;
        writable = py::bool_(!(m->flags & kReadOnly));
    } else if (PyCapsule_IsValid(capsule.ptr(), kName)) {
        t = &static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), kName))->tensor;
    } else {
        throw py::type_error("expected an unused DLPack capsule");
    }
    std::vector<int64_t> dense(static_cast<size_t>(t->ndim), 1);
    for (int32_t i = t->ndim - 2; i >= 0; --i) dense[i] = dense[i + 1] * t->shape[i + 1];
    return py::make_tuple(reinterpret_cast<uintptr_t>(t->data) + t->byte_offset, t->dtype.code, t->dtype.bits,
                          t->dtype.lanes, to_tuple(t->shape, t->ndim),
                          to_tuple(t->strides ? t->strides : dense.data(), t->ndim), writable);
}

// A capsule for C-ordered memory that `owner` keeps. Its consumer frees it from any thread.
inline py::object write(uintptr_t address, uint8_t code, uint8_t bits, const py::tuple& shape, py::object owner) {
    struct Context {
        Managed managed;
        std::vector<int64_t> shape;
        py::object owner;
    };
    auto held = std::make_unique<Context>();
    for (const auto& n : shape) held->shape.push_back(py::cast<int64_t>(n));
    held->owner = std::move(owner);
    held->managed.tensor = {reinterpret_cast<void*>(address), {kCpu, 0}, static_cast<int32_t>(held->shape.size()),
                            {code, bits, 1}, held->shape.data(), nullptr, 0};
    held->managed.context = held.get();
    held->managed.deleter = [](Managed* m) {
        py::gil_scoped_acquire gil;
        delete static_cast<Context*>(m->context);
    };
    PyObject* capsule = PyCapsule_New(&held->managed, kName, [](PyObject* c) {
        if (!PyCapsule_IsValid(c, kName)) return;  // a consumer has taken it over
        auto* m = static_cast<Managed*>(PyCapsule_GetPointer(c, kName));
        m->deleter(m);
    });
    if (!capsule) throw py::error_already_set();
    held.release();
    return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace dlpack
