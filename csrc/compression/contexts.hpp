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

// How large the codes of a chunk are that encoder or decoder have seen, and the activities of the
// rows that they are at.
class Neighbours {
  public:
    explicit Neighbours(const Shape &shape) : shape_(shape), magnitudes_(shape.count, 0) {
        for (auto &activity : activity_) {
            activity.resize(shape.length[max_axes - 1]);
        }
    }

    std::uint16_t *magnitudes() { return magnitudes_.data(); } // of all points
    const std::uint16_t *activity(std::size_t lane) const { return activity_[lane].data(); }

    // Calls function(rows, shared) for the rows of both lanes of a pass, which go by turns for
    // `shared` points; the second row counts only if that is not 0. Activities are up to date.
    template <typename Function> void for_each_pair(const Pass &pass, const Function &function) {
        const std::vector<Pass> lanes = lanes_of(pass);
        Rows first(shape_, lanes.front()), second(shape_, lanes.back());
        std::array<Row, 2> rows{};
        while (first.next(rows[0])) {
            const bool is_pair = lanes.size() == 2 && second.next(rows[1]);
            for (std::size_t lane = 0; lane < (is_pair ? 2 : 1); ++lane) {
                activity_of_row(magnitudes_.data(), shape_, lanes[lane], rows[lane],
                                activity_[lane].data());
            }
            function(rows, is_pair ? rows[1].count : 0);
        }
    }

  private:
    const Shape &shape_;
    std::vector<std::uint16_t> magnitudes_;
    std::array<std::vector<std::uint16_t>, 2> activity_;
};

} // namespace lowtide::compression
