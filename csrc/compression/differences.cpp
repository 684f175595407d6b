#include <cmath>
#include <stdexcept>
#include <string>

#include "predict.hpp"
#include "rounding.hpp"

namespace lowtide::compression {
void check_orders(const Shape &shape, const std::vector<int> &orders) {
    if (static_cast<int>(orders.size()) != shape.axes) {
        throw std::invalid_argument("orders: got " + std::to_string(orders.size()) +
                                    ", the shape has " + std::to_string(shape.axes) + " axes");
    }
    for (const int order : orders) {
        if (order < 0 || order > 2) {
            throw std::invalid_argument("orders: got " + std::to_string(order) +
                                        ", allowed are 0 to 2");
        }
    }
}

namespace {

// One difference along an axis, in place, from the end. Unsigned: wraps around.
void subtract_along(std::uint32_t *codes, const Shape &shape, int axis) {
    const std::size_t stride = shape.stride[axis];
    const std::size_t block = stride * shape.length[axis];
    for (std::size_t begin = 0; begin < shape.count; begin += block) {
        for (std::size_t at = shape.length[axis] - 1; at > 0; --at) {
            std::uint32_t *row = codes + begin + at * stride;
            const std::uint32_t *before = row - stride;
#pragma GCC ivdep
            for (std::size_t i = 0; i < stride; ++i) {
                row[i] -= before[i];
            }
        }
    }
}

void sum_along(std::uint32_t *codes, const Shape &shape, int axis) {
    const std::size_t stride = shape.stride[axis];
    const std::size_t block = stride * shape.length[axis];
    for (std::size_t begin = 0; begin < shape.count; begin += block) {
        if (stride == 1) {
            std::uint32_t sum = 0;
            for (std::size_t i = begin; i < begin + block; ++i) {
                codes[i] = sum += codes[i];
            }
            continue;
        }
        for (std::size_t at = 1; at < shape.length[axis]; ++at) {
            std::uint32_t *row = codes + begin + at * stride;
            const std::uint32_t *before = row - stride;
#pragma GCC ivdep
            for (std::size_t i = 0; i < stride; ++i) {
                row[i] += before[i];
            }
        }
    }
}

// The last axis: differences of neighbours in memory, which must not overwrite what they need.
void subtract_along_last(std::uint32_t *codes, const Shape &shape) {
    const std::size_t length = shape.length[max_axes - 1];
    for (std::size_t begin = 0; begin < shape.count; begin += length) {
        std::uint32_t before = 0;
        for (std::size_t i = begin; i < begin + length; ++i) {
            const std::uint32_t now = codes[i];
            codes[i] = now - before;
            before = now;
        }
    }
}

} // namespace

template <typename T>
void difference_encode(Span<const T> work, const Shape &shape, const std::vector<int> &orders,
                       double step, Span<std::int32_t> codes, Span<T> restored) {
    check_orders(shape, orders);
    const double inverse = 1.0 / step;
    double last = 0.0;
    for (std::size_t i = 0; i < shape.count; ++i) {
        const double k = round_even(static_cast<double>(work[i]) * inverse);
        last = std::fabs(k) < code_limit ? k : last;
        codes[i] = static_cast<std::int32_t>(last);
        restored[i] = static_cast<T>(last * step);
    }
    auto *bits = reinterpret_cast<std::uint32_t *>(codes.data());
    for (int axis = 0; axis < shape.axes; ++axis) {
        const int at = axis + max_axes - shape.axes;
        for (int turn = 0; turn < orders[axis]; ++turn) {
            if (at == max_axes - 1) {
                subtract_along_last(bits, shape);
            } else {
                subtract_along(bits, shape, at);
            }
        }
    }
}

template <typename T>
void difference_decode(Span<std::int32_t> codes, const Shape &shape, const std::vector<int> &orders,
                       double step, Span<T> restored) {
    check_orders(shape, orders);
    auto *bits = reinterpret_cast<std::uint32_t *>(codes.data());
    for (int axis = 0; axis < shape.axes; ++axis) {
        for (int turn = 0; turn < orders[axis]; ++turn) {
            sum_along(bits, shape, axis + max_axes - shape.axes);
        }
    }
    for (std::size_t i = 0; i < shape.count; ++i) {
        restored[i] = static_cast<T>(static_cast<double>(codes[i]) * step);
    }
}

#define LOWTIDE_DIFFERENCES(T)                                                                     \
    template void difference_encode<T>(Span<const T>, const Shape &, const std::vector<int> &,     \
                                       double, Span<std::int32_t>, Span<T>);                       \
    template void difference_decode<T>(Span<std::int32_t>, const Shape &,                          \
                                       const std::vector<int> &, double, Span<T>);
LOWTIDE_DIFFERENCES(float)
LOWTIDE_DIFFERENCES(double)

} // namespace lowtide::compression
