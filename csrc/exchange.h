// Tensors of other Python libraries by DLPack's C exchange API (https://dmlc.github.io/dlpack, from version 1.3 on): a look
// at where one lies costs some ten nanoseconds and runs no Python code.
//
// What is read is not owned: the caller keeps the tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"

namespace dlpack {

// What a class of tensors holds in a capsule. All functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    int (*allocate)(Tensor*, ManagedVersioned**, void*, void (*)(void*, const char*, const char*));
    int (*managed_from_object)(void*, ManagedVersioned**);
    int (*object_from_managed)(ManagedVersioned*, void**);
    int (*look)(void*, Tensor*);  // a Python object to what it is, not owned; may be null
    int (*stream)(int32_t, int32_t, void**);
};

constexpr const char *kExchangeAttribute = "__dlpack_c_exchange_api__", *kExchangeName = "dlpack_exchange_api";

// Null where objects of this class have none.
inline const ExchangeApi* exchange_of(PyTypeObject* type) {
    // A call meets tensors and parameters. The classes are kept, so that none comes to lie where another was.
    static PyTypeObject* known[4];
    static const ExchangeApi* api_of[4];
    static int count = 0;
    for (int i = 0; i < count; ++i) {
        if (known[i] == type) return api_of[i];
    }
    py::object holder = py::reinterpret_steal<py::object>(
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), kExchangeAttribute));
    if (!holder) PyErr_Clear();
    const ExchangeApi* api = nullptr;
    if (holder && PyCapsule_IsValid(holder.ptr(), kExchangeName)) {
        api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(holder.ptr(), kExchangeName));
        while (api && api->major != 1) api = api->previous;
        if (api && !api->look) api = nullptr;
    }
    if (api && count < 4) {
        Py_INCREF(type);
        known[count] = type;
        api_of[count++] = api;
    }
    return api;
}

// Whether `given` is a tensor that lies in memory; `out` is then what it is.
inline bool look(PyObject* given, Tensor* out) {
    const ExchangeApi* api = exchange_of(Py_TYPE(given));
    if (!api) return false;
    if (!api->look(given, out)) return true;
    PyErr_Clear();  // it has a shape alone, or a layout or dtype that DLPack does not know
    return false;
}

}  // namespace dlpack
