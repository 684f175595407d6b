// How the vector kernels of Adam treat memory: an update reads and writes far more than any cache
// holds, so the memory sets its speed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adam.hpp"

namespace lowtide::offload {

// From this size on, the 16-bit parameters have left the caches before anybody reads them.
constexpr std::size_t streaming_elements = std::size_t{1} << 20;

// Whether to write the low-precision parameters past the caches, from element `begin` in steps of
// 8 or 16 elements: an ordinary store first reads the line that it is going to overwrite.
inline bool streams_low(const AdamArrays &arrays, std::size_t begin) {
    const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(arrays.low.data());
    const std::size_t bytes = bytes_of(arrays.low_type);
    return arrays.size() >= streaming_elements && (first + begin * bytes) % (16 * bytes) == 0;
}

// The place to prefetch when `place` is in use. Behind the end of an array it is never read.
inline const char *ahead(const float *place) {
    constexpr std::uintptr_t distance_bytes = 1024;
    return reinterpret_cast<const char *>(reinterpret_cast<std::uintptr_t>(place) + distance_bytes);
}

} // namespace lowtide::offload
