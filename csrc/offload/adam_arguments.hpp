// What Python says about arrays, checked. Every problem is a std::invalid_argument whose text says
// where it is, what was found, what is allowed and what to do; Python sees a ValueError.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "adam_element.hpp"

namespace lowtide::offload {

// An array as Python knows it. Address 0 means that an optional array is absent.
struct ArrayArgument {
    const char *name;
    std::uintptr_t address;
    Type type;

    std::uintptr_t end(std::size_t count) const { return address + count * bytes_of(type); }
};

inline Type type_argument(const std::string &text, const char *name) {
    if (text == "float32") {
        return Type::float32;
    }
    if (text == "bfloat16") {
        return Type::bfloat16;
    }
    if (text == "float16") {
        return Type::float16;
    }
    throw std::invalid_argument(std::string(name) + ": got '" + text +
                                "', allowed is 'float32', 'bfloat16' or 'float16'; convert the "
                                "array to one of them");
}

inline Decay decay_argument(const std::string &text) {
    if (text == "none") {
        return Decay::none;
    }
    if (text == "decoupled") {
        return Decay::decoupled;
    }
    if (text == "l2") {
        return Decay::l2;
    }
    if (text == "torch_decoupled") {
        return Decay::torch_decoupled;
    }
    throw std::invalid_argument("step: got decay mode '" + text +
                                "', allowed is 'none', 'decoupled', 'l2' or 'torch_decoupled'");
}

// The longest array that can be: four bytes an element, in half the address space.
inline std::size_t count_argument(long long count) {
    constexpr long long most = std::numeric_limits<std::int64_t>::max() / 8;
    if (count < 0 || count > most) {
        throw std::invalid_argument("count: got " + std::to_string(count) + ", allowed is 0 to " +
                                    std::to_string(most) + " elements; pass tensor.numel()");
    }
    return static_cast<std::size_t>(count);
}

inline std::size_t tail_argument(long long tail, std::size_t count) {
    if (tail < 0 || static_cast<unsigned long long>(tail) > count) {
        throw std::invalid_argument("tail: got " + std::to_string(tail) + ", allowed is 0 to " +
                                    std::to_string(count) + ", the number of elements");
    }
    return static_cast<std::size_t>(tail);
}

inline void check_array(const ArrayArgument &array, std::size_t count) {
    const std::string where = std::string(array.name) + ": got ";
    if (array.address == 0 && count != 0) {
        throw std::invalid_argument(where + "a null address with " + std::to_string(count) +
                                    " elements, allowed is the address of the array; pass "
                                    "tensor.data_ptr() of a tensor that has memory");
    }
    if (array.address % bytes_of(array.type) != 0) {
        throw std::invalid_argument(where + "address " + std::to_string(array.address) +
                                    ", allowed is a multiple of the element's " +
                                    std::to_string(bytes_of(array.type)) +
                                    " bytes; copy the array to aligned memory");
    }
    if (array.end(count) < array.address) {
        throw std::invalid_argument(where + std::to_string(count) + " elements at address " +
                                    std::to_string(array.address) +
                                    ", which end beyond the address space; pass "
                                    "tensor.data_ptr() and tensor.numel() of one tensor");
    }
}

inline void check_apart(const ArrayArgument &a, const ArrayArgument &b, std::size_t count) {
    if (a.address < b.end(count) && b.address < a.end(count)) {
        throw std::invalid_argument(std::string(b.name) + ": got memory that overlaps that of " +
                                    a.name +
                                    ", allowed are arrays that do not overlap; pass a "
                                    "copy of one of them");
    }
}

// All arrays of one update of `count` elements: param, exp_avg, exp_avg_sq, grad, low_precision,
// kept_grad, in this order.
using AllArrays = std::array<ArrayArgument, 6>;

inline void check_all(const AllArrays &arrays, std::size_t count) {
    const ArrayArgument &grad = arrays[3];
    const ArrayArgument &kept = arrays[5];
    for (std::size_t b = 0; b < arrays.size(); ++b) {
        if (b >= 4 && arrays[b].address == 0) {
            continue; // absent
        }
        check_array(arrays[b], count);
        const bool in_place = b == 5 && kept.address == grad.address && grad.type == kept.type;
        for (std::size_t a = 0; a < b; ++a) {
            const bool absent = a >= 4 && arrays[a].address == 0;
            if (count != 0 && !absent && !(a == 3 && in_place)) {
                check_apart(arrays[a], arrays[b], count);
            }
        }
    }
}

} // namespace lowtide::offload
