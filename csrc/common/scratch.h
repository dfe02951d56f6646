// Uninitialised memory on cache lines of its own, freed with its owner.
//
// A thread keeps the large blocks that it frees, a few of them: memory fresh from the system costs a fault a page, which is
// more than most of what is done to it here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace mc {

// Throws std::bad_alloc. bytes: what was taken.
void* take_scratch(size_t bytes);
void give_back_scratch(void* p, size_t bytes) noexcept;

template <class T>
class Scratch {
public:
    Scratch() = default;
    explicit Scratch(int64_t n) : bytes_(static_cast<size_t>(n) * sizeof(T)) {  // throws std::bad_alloc
        data_ = static_cast<T*>(take_scratch(bytes_));
    }
    Scratch(Scratch&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Scratch& operator=(Scratch&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Scratch() {
        if (data_) give_back_scratch(data_, bytes_);
    }
    T* get() const { return data_; }

private:
    T* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace mc
