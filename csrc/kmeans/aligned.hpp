// Uninitialised memory that begins on a cache line.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "common/span.hpp"

namespace lowtide::kmeans {

template <typename T> class AlignedArray {
  public:
    AlignedArray() = default;
    explicit AlignedArray(std::size_t size) : size_(size) {
        constexpr std::size_t line = 64;
        if (size > (std::numeric_limits<std::size_t>::max() - line) / sizeof(T)) {
            throw std::bad_alloc();
        }
        const std::size_t bytes = (size * sizeof(T) + line - 1) / line * line;
        data_.reset(static_cast<T *>(std::aligned_alloc(line, bytes == 0 ? line : bytes)));
        if (data_ == nullptr) {
            throw std::bad_alloc();
        }
    }

    T *data() { return data_.get(); }
    const T *data() const { return data_.get(); }
    std::size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    Span<T> span() { return {data_.get(), size_}; }
    Span<const T> span() const { return {data_.get(), size_}; }

  private:
    struct Free {
        void operator()(T *memory) const { std::free(memory); }
    };
    std::unique_ptr<T[], Free> data_;
    std::size_t size_ = 0;
};

} // namespace lowtide::kmeans
