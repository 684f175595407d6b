// A pointer that knows its end. Every native function of Lowtide takes its memory as one of these.
#pragma once

#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace lowtide {

// Non-owning view of `size()` elements of type T; T may be const.
//
// Every way to make a smaller span or to read at an offset is checked and throws
// std::out_of_range. Only operator[] is unchecked, for inner loops whose bounds were established
// by the loop itself; -DLOWTIDE_CHECKED turns its check on (the C++ tests do).
template <typename T> class Span {
  public:
    using value_type = std::remove_cv_t<T>;

    constexpr Span() noexcept = default;

    Span(T *data, std::size_t size) : data_(data), size_(size) {
        if (data == nullptr && size != 0) {
            throw std::invalid_argument("Span: null pointer with size " + std::to_string(size));
        }
        if (size > std::numeric_limits<std::size_t>::max() / sizeof(T)) {
            throw std::invalid_argument("Span: size in bytes does not fit into size_t");
        }
    }

    // A writable span is also a read-only one.
    template <typename U, typename = std::enable_if_t<std::is_same_v<T, const U>>>
    constexpr Span(Span<U> other) noexcept : data_(other.data()), size_(other.size()) {}

    constexpr T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr std::size_t size_bytes() const noexcept { return size_ * sizeof(T); }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T *begin() const noexcept { return data_; }
    constexpr T *end() const noexcept { return data_ + size_; }

    T &operator[](std::size_t index) const {
#ifdef LOWTIDE_CHECKED
        return at(index);
#else
        return data_[index];
#endif
    }

    T &at(std::size_t index) const {
        if (index >= size_) {
            fail("index", index, 1);
        }
        return data_[index];
    }

    Span first(std::size_t count) const { return subspan(0, count); }

    Span last(std::size_t count) const {
        if (count > size_) {
            fail("last", 0, count);
        }
        return Span(data_ + (size_ - count), count);
    }

    // Everything from `offset` on.
    Span drop(std::size_t offset) const {
        if (offset > size_) {
            fail("drop", offset, 0);
        }
        return Span(data_ + offset, size_ - offset);
    }

    Span subspan(std::size_t offset, std::size_t count) const {
        // Written without a sum, which could wrap around for hostile numbers.
        if (offset > size_ || count > size_ - offset) {
            fail("subspan", offset, count);
        }
        return Span(data_ + offset, count);
    }

  private:
    [[noreturn]] void fail(const char *what, std::size_t offset, std::size_t count) const {
        throw std::out_of_range(std::string("Span::") + what + ": offset " +
                                std::to_string(offset) + ", count " + std::to_string(count) +
                                ", but the span has " + std::to_string(size_) + " elements");
    }

    T *data_ = nullptr;
    std::size_t size_ = 0;
};

using ConstBytes = Span<const unsigned char>;
using Bytes = Span<unsigned char>;

// Read a T stored in this machine's byte order at any alignment; throws std::out_of_range.
template <typename T> T load(ConstBytes bytes, std::size_t offset) {
    static_assert(std::is_trivially_copyable_v<T>, "load() copies bytes");
    T value;
    std::memcpy(&value, bytes.subspan(offset, sizeof(T)).data(), sizeof(T));
    return value;
}

// Write a T in this machine's byte order at any alignment; throws std::out_of_range.
template <typename T> void store(Bytes bytes, std::size_t offset, T value) {
    static_assert(std::is_trivially_copyable_v<T>, "store() copies bytes");
    std::memcpy(bytes.subspan(offset, sizeof(T)).data(), &value, sizeof(T));
}

} // namespace lowtide
