// Whether tensors and Python's dicts that were looked at once are what they were. A decode step asks this of a model's
// weights and modules when nothing of them is in the caches: so what will be looked at is brought near first.
#pragma once

#include <array>
#include <cstring>
#include <string>
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

// What must stay the very same: the classes of Python objects, the entries of dicts in their order, single items of other
// dicts. And dicts that are looked at for being empty.
class WatchedTables {
    using Objects = std::vector<py::object>;

    template <class Self>
    static auto held_by(Self& self) {
        return std::array{&self.objects_,   &self.types_,       &self.tables_,         &self.item_dicts_,
                          &self.item_keys_, &self.item_values_, &self.expected_empty_, &self.entries_};
    }

public:
    enum Look { kSame = 0, kFilled = 1, kOther = 2 };

    // items: dicts and a key of each.
    WatchedTables(const py::sequence& objects, const py::sequence& tables, const py::sequence& items,
                  const py::sequence& expected_empty) {
        for (const auto& given : objects) {
            objects_.push_back(py::reinterpret_borrow<py::object>(given));
            types_.push_back(py::type::of(given));
        }
        for (const auto& given : tables) {
            tables_.push_back(dict("tables", given));
            PyObject *key, *value;
            for (Py_ssize_t at = 0; PyDict_Next(given.ptr(), &at, &key, &value);) {
                entries_.push_back(py::reinterpret_borrow<py::object>(key));
                entries_.push_back(py::reinterpret_borrow<py::object>(value));
            }
            ends_.push_back(entries_.size());
        }
        for (const auto& given : items) {
            const auto parts = py::cast<py::tuple>(given);
            if (parts.size() != 2) throw py::value_error("items: expected (dict, key)");
            item_dicts_.push_back(dict("items", parts[0]));
            item_keys_.push_back(parts[1]);
            item_values_.push_back(py::reinterpret_borrow<py::object>(item(item_keys_.size() - 1)));
        }
        for (const auto& given : expected_empty) expected_empty_.push_back(dict("expected_empty", given));
    }

    // kOther: something is not what it was. kFilled: it all is, and one of `expected_empty` is not empty.
    int look() const {
        for (size_t i = 0; i < objects_.size(); ++i) {
            if (i + kAhead < objects_.size()) __builtin_prefetch(objects_[i + kAhead].ptr());
            if (Py_TYPE(objects_[i].ptr()) != reinterpret_cast<const PyTypeObject*>(types_[i].ptr())) return kOther;
        }
        size_t first = 0;
        for (size_t i = 0; i < tables_.size(); ++i) {
            fetch(tables_, i);
            size_t at = first;
            first = ends_[i];
            if (static_cast<size_t>(PyDict_GET_SIZE(tables_[i].ptr())) != (first - at) / 2) return kOther;
            PyObject *key, *value;
            for (Py_ssize_t place = 0; at < first && PyDict_Next(tables_[i].ptr(), &place, &key, &value); at += 2) {
                if (key != entries_[at].ptr() || value != entries_[at + 1].ptr()) return kOther;
            }
        }
        for (size_t i = 0; i < item_dicts_.size(); ++i) {
            fetch(item_dicts_, i);
            if (item(i) != item_values_[i].ptr()) return kOther;
        }
        for (size_t i = 0; i < expected_empty_.size(); ++i) {
            fetch(expected_empty_, i);
            if (PyDict_GET_SIZE(expected_empty_[i].ptr())) return kFilled;
        }
        return kSame;
    }

    // What Python's collector of cycles has to know: a hook may hold the very decoder that holds this.
    int traverse(visitproc visit, void* arg) const {
        for (const Objects* held : held_by(*this)) {
            for (const auto& one : *held) Py_VISIT(one.ptr());
        }
        return 0;
    }

    void clear() {
        ends_.clear();
        for (Objects* held : held_by(*this)) Objects().swap(*held);
    }

private:
    static constexpr size_t kAhead = 8;

    static py::object dict(const char* name, const py::handle& given) {
        if (!PyDict_Check(given.ptr())) throw py::type_error(std::string(name) + ": expected dicts");
        return py::reinterpret_borrow<py::object>(given);
    }

    // Null: the dict has none.
    PyObject* item(size_t i) const {
        PyObject* value = PyDict_GetItemWithError(item_dicts_[i].ptr(), item_keys_[i].ptr());
        if (!value && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }

    // Brings near the dicts that will be looked at next, and then what holds the keys and values of few entries.
    static void fetch(const Objects& dicts, size_t i) {
        if (i + 2 * kAhead < dicts.size()) {
            const char* at = reinterpret_cast<const char*>(dicts[i + 2 * kAhead].ptr());
            __builtin_prefetch(at);
            __builtin_prefetch(at + sizeof(PyDictObject) - 1);
        }
        if (i + kAhead < dicts.size()) {
            const auto* dict = reinterpret_cast<const PyDictObject*>(dicts[i + kAhead].ptr());
            __builtin_prefetch(dict->ma_values);
            __builtin_prefetch(dict->ma_keys);
            __builtin_prefetch(reinterpret_cast<const char*>(dict->ma_keys) + 64);
        }
    }

    Objects objects_, types_, tables_, item_dicts_, item_keys_, item_values_, expected_empty_;
    Objects entries_;           // a key and its value, table after table
    std::vector<size_t> ends_;  // of each table among the entries
};

// Null before its constructor has run.
WatchedTables* watched_tables(PyObject* self) {
    const auto value = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return value.holder_constructed() ? static_cast<WatchedTables*>(value.value_ptr()) : nullptr;
}

void define_watched_tables(py::module_& m) {
    py::class_<WatchedTables>(m, "WatchedTables", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
        PyTypeObject& type = heap_type->ht_type;
        type.tp_flags |= Py_TPFLAGS_HAVE_GC;
        type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
            Py_VISIT(Py_TYPE(self));
            const WatchedTables* tables = watched_tables(self);
            return tables ? tables->traverse(visit, arg) : 0;
        };
        type.tp_clear = [](PyObject* self) {
            if (WatchedTables* tables = watched_tables(self)) tables->clear();
            return 0;
        };
    }))
        .def(py::init<const py::sequence&, const py::sequence&, const py::sequence&, const py::sequence&>(),
             "objects"_a, "tables"_a, "items"_a, "expected_empty"_a)
        .def("look", &WatchedTables::look);
}

}  // namespace
