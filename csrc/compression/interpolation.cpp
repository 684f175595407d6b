#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "predict.hpp"
#include "rounding.hpp"

namespace lowtide::compression {
namespace {

// Which neighbours a point has beside the one before it: one far before, one behind, far behind.
enum class Has { nothing, far_before, behind, behind_and_far_before, behind_and_far_behind, all };

Has neighbours(std::size_t at, std::size_t distance, std::size_t length) {
    const bool far_before = at >= 3 * distance;
    if (at + distance >= length) {
        return far_before ? Has::far_before : Has::nothing;
    }
    const bool far_behind = at + 3 * distance < length;
    if (far_before) {
        return far_behind ? Has::all : Has::behind_and_far_before;
    }
    return far_behind ? Has::behind_and_far_behind : Has::behind;
}

// `r` points at the point itself, `d` is the distance in elements. FORMAT.md fixes the operations.
template <typename T, Has has, bool cubic> inline T predict(const T *r, std::ptrdiff_t d) {
    if constexpr (has == Has::nothing) {
        return r[-d];
    } else if constexpr (has == Has::far_before) {
        return T(1.5) * r[-d] - T(0.5) * r[-3 * d];
    } else if constexpr (!cubic || has == Has::behind) {
        return (r[-d] + r[d]) * T(0.5);
    } else if constexpr (has == Has::all) {
        return (T(9) * (r[-d] + r[d]) - (r[-3 * d] + r[3 * d])) * T(0.0625);
    } else if constexpr (has == Has::behind_and_far_before) {
        return ((T(6) * r[-d] + T(3) * r[d]) - r[-3 * d]) * T(0.125);
    } else {
        return ((T(3) * r[-d] + T(6) * r[d]) - r[3 * d]) * T(0.125);
    }
}

// How the part of one axis goes into a prediction.
enum class Part { alone, first, further };

template <typename T, Has has, bool cubic, Part part>
void add_points(const T *restored, std::size_t count, std::size_t step, std::ptrdiff_t distance,
                T share, T *prediction) {
    // No point of a pass is a neighbour of another one.
#pragma GCC ivdep
    for (std::size_t i = 0; i < count; ++i) {
        const T p = predict<T, has, cubic>(restored + i * step, distance);
        if constexpr (part == Part::alone) {
            prediction[i] = p;
        } else if constexpr (part == Part::first) {
            prediction[i] = share * p;
        } else {
            prediction[i] = prediction[i] + share * p;
        }
    }
}

template <typename T, bool cubic, Part part>
void add_points(Has has, const T *restored, std::size_t count, std::size_t step,
                std::ptrdiff_t distance, T share, T *out) {
    switch (has) {
    case Has::nothing:
        return add_points<T, Has::nothing, cubic, part>(restored, count, step, distance, share,
                                                        out);
    case Has::far_before:
        return add_points<T, Has::far_before, cubic, part>(restored, count, step, distance, share,
                                                           out);
    case Has::behind:
        return add_points<T, Has::behind, cubic, part>(restored, count, step, distance, share, out);
    case Has::behind_and_far_before:
        return add_points<T, Has::behind_and_far_before, cubic, part>(restored, count, step,
                                                                      distance, share, out);
    case Has::behind_and_far_behind:
        return add_points<T, Has::behind_and_far_behind, cubic, part>(restored, count, step,
                                                                      distance, share, out);
    case Has::all:
        return add_points<T, Has::all, cubic, part>(restored, count, step, distance, share, out);
    }
}

// The part of one axis in the predictions of a row.
template <typename T, bool cubic, Part part>
void add_axis(const Shape &shape, const Pass &pass, const Row &row, int axis, const T *restored,
              T *prediction) {
    const std::size_t length = shape.length[axis];
    const auto distance = static_cast<std::ptrdiff_t>(pass.distance * shape.stride[axis]);
    const T share = static_cast<T>(pass.share[axis]);
    const auto add = [&](Has has, std::size_t begin, std::size_t count) {
        add_points<T, cubic, part>(has, restored + row.base + begin * row.step, count, row.step,
                                   distance, share, prediction + begin);
    };
    if (axis != max_axes - 1) {
        add(neighbours(row.at[axis], pass.distance, length), 0, row.count);
        return;
    }
    // Along the row itself: the first point and the last two may lack neighbours.
    const auto one = [&](std::size_t i) {
        add(neighbours(row.at[3] + i * row.step, pass.distance, length), i, 1);
    };
    one(0);
    const std::size_t end = row.count < 3 ? 1 : row.count - 2;
    add(Has::all, 1, end - 1);
    for (std::size_t i = end; i < row.count; ++i) {
        one(i);
    }
}

template <typename T, bool cubic>
void predict_row(const Shape &shape, const Pass &pass, const Row &row, const T *restored,
                 T *prediction) {
    bool is_first = true;
    for (int axis = 0; axis < max_axes; ++axis) {
        if (pass.share[axis] == 1.0) {
            add_axis<T, cubic, Part::alone>(shape, pass, row, axis, restored, prediction);
        } else if (pass.share[axis] != 0.0 && is_first) {
            add_axis<T, cubic, Part::first>(shape, pass, row, axis, restored, prediction);
            is_first = false;
        } else if (pass.share[axis] != 0.0) {
            add_axis<T, cubic, Part::further>(shape, pass, row, axis, restored, prediction);
        }
    }
}

template <typename T> inline bool is_number(T x) {
    return std::fabs(x) <= std::numeric_limits<T>::max(); // NaN compares false
}

template <typename T> struct Encoder {
    const T *work;
    std::int32_t *codes;
    T *restored;
    double step, inverse;

    void operator()(std::size_t at, T predicted) const {
        const T p = is_number(predicted) ? predicted : T(0);
        double q = round_even((static_cast<double>(work[at]) - static_cast<double>(p)) * inverse);
        q = std::fabs(q) < code_limit ? q : 0.0;
        const T r = static_cast<T>(static_cast<double>(p) + q * step);
        codes[at] = static_cast<std::int32_t>(is_number(r) ? q : 0.0);
        restored[at] = is_number(r) ? r : p;
    }
};

template <typename T> struct Decoder {
    const std::int32_t *codes;
    T *restored;
    double step, inverse; // the inverse is the encoder's only

    void operator()(std::size_t at, T predicted) const {
        const T p = is_number(predicted) ? predicted : T(0);
        const T r = static_cast<T>(static_cast<double>(p) + static_cast<double>(codes[at]) * step);
        restored[at] = is_number(r) ? r : p;
    }
};

double step_of(const Interpolation &how, double step, int level) {
    const double alpha = 1.0 + how.alpha / 8.0;
    const double beta = 1.0 + how.beta / 4.0;
    double factor = 1.0;
    for (int turn = 1; turn < level; ++turn) {
        factor *= alpha;
    }
    return step / std::min(factor, beta);
}

template <typename T, typename Coder>
void all_passes(const Shape &shape, const Interpolation &how, double step, Coder coder) {
    if (how.alpha < 0 || how.alpha > 255 || how.beta < 0 || how.beta > 255) {
        throw std::invalid_argument("alpha, beta: got " + std::to_string(how.alpha) + " and " +
                                    std::to_string(how.beta) + ", allowed are 0 to 255");
    }
    std::vector<T> prediction(shape.length[3]);
    for (const Pass &pass : scan_of_interpolation(shape, how.weights)) {
        coder.step = step_of(how, step, pass.level);
        coder.inverse = 1.0 / coder.step;
        if (pass.distance == 0) {
            coder(0, T(0));
            continue;
        }
        for_each_row(shape, pass, [&](const Row &row) {
            if (how.cubic) {
                predict_row<T, true>(shape, pass, row, coder.restored, prediction.data());
            } else {
                predict_row<T, false>(shape, pass, row, coder.restored, prediction.data());
            }
#pragma GCC ivdep
            for (std::size_t i = 0; i < row.count; ++i) {
                coder(row.base + i * row.step, prediction[i]);
            }
        });
    }
}

} // namespace

template <typename T>
void interpolation_encode(Span<const T> work, const Shape &shape, const Interpolation &how,
                          double step, Span<std::int32_t> codes, Span<T> restored) {
    const Encoder<T> coder{work.data(), codes.data(), restored.data(), step, 1.0 / step};
    all_passes<T>(shape, how, step, coder);
}

template <typename T>
void interpolation_decode(Span<const std::int32_t> codes, const Shape &shape,
                          const Interpolation &how, double step, Span<T> restored) {
    const Decoder<T> coder{codes.data(), restored.data(), step, 1.0 / step};
    all_passes<T>(shape, how, step, coder);
}

#define LOWTIDE_INTERPOLATION(T)                                                                   \
    template void interpolation_encode<T>(Span<const T>, const Shape &, const Interpolation &,     \
                                          double, Span<std::int32_t>, Span<T>);                    \
    template void interpolation_decode<T>(Span<const std::int32_t>, const Shape &,                 \
                                          const Interpolation &, double, Span<T>);
LOWTIDE_INTERPOLATION(float)
LOWTIDE_INTERPOLATION(double)

} // namespace lowtide::compression
