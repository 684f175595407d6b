// Tokens of codes, and the contexts that they are coded in. Format: FORMAT.md, section 5.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/span.hpp"
#include "scan.hpp"

namespace lowtide::compression {

constexpr unsigned tokens = 128;
constexpr unsigned direct_tokens = 16;
constexpr unsigned buckets = 22;
constexpr unsigned groups = 6;
constexpr unsigned largest_magnitude = 1023;
constexpr unsigned largest_activity = 7 * largest_magnitude;

inline std::uint32_t zigzag(std::int32_t code) {
    const auto bits = static_cast<std::uint32_t>(code);
    return (bits << 1) ^ (0U - (bits >> 31));
}

inline std::int32_t unzigzag(std::uint32_t u) {
    return static_cast<std::int32_t>((u >> 1) ^ (0U - (u & 1U)));
}

struct Token {
    unsigned token;
    unsigned extra_bits; // how many of the low bits of u follow
};

inline Token token_of(std::uint32_t u) {
    if (u < direct_tokens) {
        return {u, 0};
    }
    const unsigned n = 31U - static_cast<unsigned>(__builtin_clz(u));
    return {direct_tokens + 4 * (n - 4) + ((u >> (n - 2)) & 3U), n - 2};
}

inline unsigned extra_bits_of(unsigned token) {
    return token < direct_tokens ? 0 : (token - direct_tokens) / 4 + 2;
}

// The number that a token and its extra bits stand for.
inline std::uint32_t number_of(unsigned token, std::uint32_t extra) {
    if (token < direct_tokens) {
        return token;
    }
    const unsigned n = (token - direct_tokens) / 4 + 4;
    return ((4U + ((token - direct_tokens) & 3U)) << (n - 2)) | extra;
}

inline std::uint16_t magnitude_of(std::uint32_t u) {
    return static_cast<std::uint16_t>(u < largest_magnitude ? u : largest_magnitude);
}

// Bucket of every activity.
const std::array<std::uint8_t, largest_activity + 1> &bucket_table();

// How contexts are merged.
struct Merging {
    unsigned shift = 0;
    bool keeps_groups = false;

    unsigned width() const { return ((buckets - 1) >> shift) + 1; }
    unsigned contexts() const { return (keeps_groups ? groups : 1) * width(); }
    unsigned context(unsigned group, unsigned bucket) const {
        return (keeps_groups ? group : 0) * width() + (bucket >> shift);
    }
};

// What a row's activities get from everything but the previous point of the row.
// `magnitudes`: of all points of the chunk, 0 where not coded yet; `activity`: row.count numbers.
void activity_of_row(const std::uint16_t *magnitudes, const Shape &shape, const Pass &pass,
                     const Row &row, std::uint16_t *activity);

} // namespace lowtide::compression
