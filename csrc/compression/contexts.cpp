#include "contexts.hpp"

#include <algorithm>

namespace lowtide::compression {
namespace {

constexpr std::array<unsigned, buckets - 1> limits = {
    0, 1, 2, 4, 6, 9, 13, 18, 26, 38, 54, 80, 120, 180, 270, 400, 600, 900, 1400, 2200, 3500};

std::array<std::uint8_t, largest_activity + 1> make_table() {
    std::array<std::uint8_t, largest_activity + 1> table{};
    for (unsigned activity = 0; activity <= largest_activity; ++activity) {
        const auto *end = std::lower_bound(limits.begin(), limits.end(), activity);
        table[activity] = static_cast<std::uint8_t>(end - limits.begin());
    }
    return table;
}

} // namespace

const std::array<std::uint8_t, largest_activity + 1> &bucket_table() {
    static const auto table = make_table();
    return table;
}

void activity_of_row(const std::uint16_t *magnitudes, const Shape &shape, const Pass &pass,
                     const Row &row, std::uint16_t *activity) {
    const std::size_t count = row.count;
    std::fill_n(activity, count, std::uint16_t{0});
    const auto add = [&](const std::uint16_t *from, std::size_t points, unsigned weight) {
#pragma GCC ivdep
        for (std::size_t i = 0; i < points; ++i) {
            activity[i] = static_cast<std::uint16_t>(activity[i] + weight * from[i * row.step]);
        }
    };
    const std::uint16_t *here = magnitudes + row.base;
    for (const int axis : {2, 1}) {
        if (row.has_previous[axis]) {
            add(here - pass.step[axis] * shape.stride[axis], count, axis == 2 ? 2 : 1);
        }
    }
    if (pass.distance == 0) {
        return;
    }
    const std::size_t distance = pass.distance * shape.stride[pass.axis];
    add(here - distance, count, 1);
    if (pass.axis != max_axes - 1) {
        if (row.at[pass.axis] + pass.distance < shape.length[pass.axis]) {
            add(here + distance, count, 1);
        }
        return;
    }
    const std::size_t last = row.at[3] + (count - 1) * row.step + pass.distance;
    add(here + distance, last < shape.length[3] ? count : count - 1, 1);
}

} // namespace lowtide::compression
