// In which order the points of a chunk are coded: passes over sub-lattices, rows of each.
// Format: plugins/lowtide/compression/FORMAT.md, sections 4 and 5.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lowtide::compression {

constexpr int max_axes = 4;

// Shape of a chunk, aligned to the right: missing axes come first and have length 1.
struct Shape {
    explicit Shape(const std::vector<std::size_t> &lengths);

    int axes = 0; // of the caller, 1 to 4
    std::size_t count = 1;
    std::array<std::size_t, max_axes> length{1, 1, 1, 1};
    std::array<std::size_t, max_axes> stride{}; // in elements
};

// One pass: the points first + i * step (i < points) on every axis, in C order.
struct Pass {
    std::array<std::size_t, max_axes> first{0, 0, 0, 0};
    std::array<std::size_t, max_axes> step{1, 1, 1, 1};
    std::array<std::size_t, max_axes> points{1, 1, 1, 1};
    std::size_t distance = 0;                       // of the neighbours; 0: nothing is interpolated
    std::array<double, max_axes> share{0, 0, 0, 0}; // of each axis in the prediction; sum 1
    int axis = -1;                                  // with the largest share
    int level = 0;
    int group = 0; // of contexts
};

// A row of a pass: `count` points from `base` on, `step` elements apart, along the last axis.
struct Row {
    std::size_t base;
    std::size_t count;
    std::size_t step;
    std::array<std::size_t, max_axes> at;    // coordinates of the first point
    std::array<bool, max_axes> has_previous; // on the axis; of the last axis: of the first point
};

std::vector<Pass> scan_of_differences(const Shape &shape);

// `weights`: how much each of the caller's axes counts, 0 to 255, where several could be
// interpolated along. Throws std::invalid_argument for other numbers.
std::vector<Pass> scan_of_interpolation(const Shape &shape, const std::vector<int> &weights);

// A pass in one or two lanes, which are coded independently of each other: a decoder works on both
// at a time and hides the latency of each. Cut in the middle of the first axis with several points.
std::vector<Pass> lanes_of(const Pass &pass);

// The rows of a pass, one after the other, in C order.
class Rows {
  public:
    Rows(const Shape &shape, const Pass &pass) : shape_(shape), pass_(pass) {
        row_.count = pass.points[3];
        row_.step = pass.step[3];
        row_.at = pass.first;
    }

    // Sets `row` to the next one; false at the end.
    bool next(Row &row) {
        if (is_at_end_) {
            return false;
        }
        row_.base = row_.at[3];
        for (int axis = 0; axis < max_axes - 1; ++axis) {
            row_.at[axis] = pass_.first[axis] + index_[axis] * pass_.step[axis];
            row_.base += row_.at[axis] * shape_.stride[axis];
            row_.has_previous[axis] = index_[axis] > 0;
        }
        row = row_;
        int axis = max_axes - 2;
        while (axis >= 0 && ++index_[axis] == pass_.points[axis]) {
            index_[axis--] = 0;
        }
        is_at_end_ = axis < 0;
        return true;
    }

  private:
    const Shape &shape_;
    const Pass &pass_;
    Row row_{};
    std::array<std::size_t, max_axes - 1> index_{};
    bool is_at_end_ = false;
};

template <typename Function>
void for_each_row(const Shape &shape, const Pass &pass, const Function &function) {
    Rows rows(shape, pass);
    for (Row row; rows.next(row);) {
        function(row);
    }
}

} // namespace lowtide::compression
