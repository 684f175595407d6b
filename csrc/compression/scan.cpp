#include "scan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lowtide::compression {

Shape::Shape(const std::vector<std::size_t> &lengths) : axes(static_cast<int>(lengths.size())) {
    if (lengths.empty() || lengths.size() > max_axes) {
        throw std::invalid_argument("shape: got " + std::to_string(lengths.size()) +
                                    " axes, allowed are 1 to 4");
    }
    constexpr std::size_t most = (std::size_t{1} << 31) - 1; // counts of points fit in 32 bits
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        if (lengths[i] == 0 || lengths[i] > most / count) {
            throw std::invalid_argument("shape: axis " + std::to_string(i) + " has length " +
                                        std::to_string(lengths[i]) +
                                        ", allowed are 1 and more, in all fewer than 2^31 points");
        }
        count *= lengths[i];
        length[max_axes - lengths.size() + i] = lengths[i];
    }
    std::size_t below = 1;
    for (int axis = max_axes - 1; axis >= 0; --axis) {
        stride[axis] = below;
        below *= length[axis];
    }
}

std::vector<Pass> lanes_of(const Pass &pass) {
    for (int axis = 0; axis < max_axes; ++axis) {
        if (pass.points[axis] > 1) {
            std::vector<Pass> lanes{pass, pass};
            lanes[0].points[axis] = (pass.points[axis] + 1) / 2;
            lanes[1].points[axis] -= lanes[0].points[axis];
            lanes[1].first[axis] += lanes[0].points[axis] * pass.step[axis];
            return lanes;
        }
    }
    return {pass};
}

std::vector<Pass> scan_of_differences(const Shape &shape) {
    Pass all;
    all.points = shape.length;
    return {all};
}

namespace {

// Shares of the axes in `subset` (a bit for each); all the same where no weight is given.
void share_out(Pass &pass, unsigned subset, const std::array<int, max_axes> &weights) {
    int sum = 0, members = 0;
    for (int axis = 0; axis < max_axes; ++axis) {
        sum += (subset >> axis & 1U) != 0 ? weights[axis] : 0;
        members += static_cast<int>(subset >> axis & 1U);
    }
    int largest = -1;
    for (int axis = 0; axis < max_axes; ++axis) {
        if ((subset >> axis & 1U) == 0) {
            continue;
        }
        const int weight = sum == 0 ? 1 : weights[axis];
        pass.share[axis] = static_cast<double>(weight) / (sum == 0 ? members : sum);
        if (weight > largest) {
            largest = weight;
            pass.axis = axis;
        }
    }
    pass.group = pass.level >= 3 ? 0 : pass.level == 2 ? 1 : 1 + members;
}

// Subsets of the axes, the smaller ones first, each size in rising order.
std::vector<unsigned> subsets(int axes) {
    std::vector<unsigned> all;
    for (int size = 1; size <= axes; ++size) {
        for (unsigned subset = 1; subset < 1U << axes; ++subset) {
            if (__builtin_popcount(subset) == size) {
                all.push_back(subset);
            }
        }
    }
    return all;
}

} // namespace

std::vector<Pass> scan_of_interpolation(const Shape &shape, const std::vector<int> &weights) {
    if (static_cast<int>(weights.size()) != shape.axes) {
        throw std::invalid_argument("weights: got " + std::to_string(weights.size()) +
                                    ", the shape has " + std::to_string(shape.axes) + " axes");
    }
    const int missing = max_axes - shape.axes;
    std::array<int, max_axes> aligned{};
    for (int axis = 0; axis < shape.axes; ++axis) {
        if (weights[axis] < 0 || weights[axis] > 255) {
            throw std::invalid_argument("weights: got " + std::to_string(weights[axis]) +
                                        ", allowed are 0 to 255");
        }
        aligned[missing + axis] = weights[axis];
    }
    const std::size_t longest = *std::max_element(shape.length.begin(), shape.length.end());
    int levels = 0;
    while ((std::size_t{1} << levels) < longest) {
        ++levels;
    }
    std::vector<Pass> passes(1);
    passes[0].level = std::max(levels, 1);
    for (int level = levels; level >= 1; --level) {
        for (const unsigned of_caller : subsets(shape.axes)) {
            const unsigned subset = of_caller << missing;
            Pass pass;
            pass.level = level;
            pass.distance = std::size_t{1} << (level - 1);
            pass.step.fill(2 * pass.distance);
            bool has_points = true;
            for (int axis = 0; axis < max_axes; ++axis) {
                pass.first[axis] = (subset >> axis & 1U) != 0 ? pass.distance : 0;
                if (pass.first[axis] >= shape.length[axis]) {
                    has_points = false;
                    break;
                }
                pass.points[axis] =
                    (shape.length[axis] - 1 - pass.first[axis]) / pass.step[axis] + 1;
            }
            if (has_points) {
                share_out(pass, subset, aligned);
                passes.push_back(pass);
            }
        }
    }
    return passes;
}

} // namespace lowtide::compression
