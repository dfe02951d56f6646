// Uninitialised memory on cache lines of its own, freed with its owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace mc {

template <class T>
class Scratch {
public:
    Scratch() = default;
    explicit Scratch(int64_t n)  // throws std::bad_alloc
        : data_(static_cast<T*>(::operator new[](static_cast<size_t>(n) * sizeof(T), kLine))) {}
    T* get() const { return data_.get(); }

private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, kLine); }
    };
    std::unique_ptr<T[], Free> data_;
};

}  // namespace mc
