#include "samples.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/default_arithmetic.hpp"
#include "common/thread_pool.hpp"

namespace lowtide::kmeans {
namespace {

// Fewer rows than this are not worth a buffer of sums of their own, and more ranges than this
// not worth the memory.
constexpr std::size_t least_rows = 1024;

// A multiple of the lanes of any level, so that all have the same ranges.
constexpr std::size_t range_align = 64;
constexpr std::size_t most_ranges = 256;

// Rows that the frame is estimated from, spread over all.
constexpr std::size_t most_looked_at = 1024;

std::size_t rounded_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Exponent of the power of two at or below a positive number.
int exponent_of(double value) {
    int exponent = 0;
    std::frexp(value, &exponent);
    return exponent - 1;
}

template <typename T> Frame<T> frame_of(const SampleView<T> &samples) {
    const std::size_t features = samples.features;
    Frame<T> frame;
    frame.origin.assign(features, 0);
    const std::size_t stride = std::max<std::size_t>(1, samples.count / most_looked_at);
    std::vector<double> means(features, 0.0);
    std::vector<double> spreads(features, 0.0);
    double looked_at = 0;
    for (std::size_t i = 0; i < samples.count; i += stride, ++looked_at) {
        for (std::size_t d = 0; d < features; ++d) {
            // From the first row on, so that the mean of rows that are alike is that row.
            means[d] += static_cast<double>(samples.rows[i * features + d]) -
                        static_cast<double>(samples.rows[d]);
        }
    }
    for (std::size_t d = 0; d < features && samples.count != 0; ++d) {
        means[d] = means[d] / looked_at + static_cast<double>(samples.rows[d]);
    }
    for (std::size_t i = 0; i < samples.count; i += stride) {
        for (std::size_t d = 0; d < features; ++d) {
            spreads[d] += std::fabs(static_cast<double>(samples.rows[i * features + d]) - means[d]);
        }
    }
    double spread = 0; // the largest mean deviation of a feature
    for (const double each : spreads) {
        spread = std::max(spread, each / std::max(1.0, looked_at));
    }
    if (!std::isfinite(spread)) {
        return frame; // which packing finds, if it is the samples' fault
    }
    if (spread < static_cast<double>(std::numeric_limits<T>::min())) { // rows are alike
        std::copy_n(samples.rows, samples.count == 0 ? 0 : features, frame.origin.begin());
        return frame;
    }
    const int exponent = exponent_of(spread);
    const double step = std::ldexp(1.0, exponent);
    for (std::size_t d = 0; d < features; ++d) {
        frame.origin[d] = static_cast<T>(std::nearbyint(means[d] / step) * step);
    }
    constexpr int most = std::numeric_limits<T>::max_exponent - 2; // the scale must be a T itself
    frame.scale = static_cast<T>(std::ldexp(1.0, -std::clamp(exponent, -most, most)));
    return frame;
}

template <typename T> void refuse_if_not_finite(const SampleView<T> &samples) {
    for (std::size_t i = 0; i < samples.count * samples.features; ++i) {
        if (!std::isfinite(samples.rows[i])) {
            throw std::domain_error("samples: got " + std::to_string(samples.rows[i]) + " in row " +
                                    std::to_string(i / samples.features) + ", column " +
                                    std::to_string(i % samples.features) +
                                    ", allowed are finite numbers; leave such rows out or fill "
                                    "them in");
        }
    }
}

} // namespace

Ranges ranges_of(std::size_t rows) {
    const std::size_t wanted = std::clamp<std::size_t>(rows / least_rows, 1, most_ranges);
    const std::size_t each =
        std::max(range_align, rounded_up((rows + wanted - 1) / wanted, range_align));
    return {(rows + each - 1) / each, each, rows};
}

template <typename T>
Samples<T>::Samples(Span<const T> rows, std::size_t count, std::size_t features,
                    const double *weights, Level level, unsigned threads)
    : kernels_(kernels_of<T>(level)) {
    if (kernels_ == nullptr) {
        throw std::runtime_error(std::string("level: '") + name_of(level) +
                                 "' cannot run on this processor");
    }
    if (features == 0 || rows.size() / features != count || rows.size() % features != 0) {
        throw std::invalid_argument("samples: their size is not count times features");
    }
    const std::size_t lanes = kernels_->lanes;
    view_ = {rows.data(), count, features, weights, nullptr, nullptr};
    ranges_ = ranges_of(count);
    frame_ = frame_of(view_);
    panels_ = AlignedArray<T>(rounded_up(count, lanes) * features);
    view_.panels = panels_.data();
    largest_ = pack_all(threads);
    if (!std::isfinite(largest_)) {
        refuse_if_not_finite(view_);
        frame_ = Frame<T>(); // a few are too far from the others for the scale
        frame_.origin.assign(features, 0);
        largest_ = pack_all(threads);
    }
}

template <typename T> T Samples<T>::pack_all(unsigned threads) {
    std::vector<T> largest(ranges_.count, 0);
    run_tasks(ranges_.count, threads, [&](std::size_t range) {
        const DefaultArithmetic exact;
        for (std::size_t row = ranges_.begin(range); row < ranges_.end(range);
             row += kernels_->lanes) {
            const T found = pack(row, panels_.data() + row * view_.features);
            largest[range] = found <= largest[range] ? largest[range] : found; // NaN stays
        }
    });
    T most = 0;
    for (const T each : largest) {
        most = each <= most ? most : each;
    }
    return most;
}

template <typename T> T Samples<T>::pack(std::size_t row, T *panel) const {
    const std::size_t count = std::min(kernels_->lanes, view_.count - row);
    return kernels_->pack(view_.rows + row * view_.features, count, view_.features,
                          frame_.origin.data(), frame_.scale, panel);
}

template <typename T> void Samples<T>::add_up(std::size_t range) {
    const std::size_t features = view_.features;
    double *const sums = sums_.sums.data() + range * features;
    double *const magnitudes = sums_.magnitudes.data() + range * features;
    for (std::size_t i = ranges_.begin(range); i < ranges_.end(range); ++i) {
        const double weight = view_.weights == nullptr ? 1.0 : view_.weights[i];
        const T *const row = view_.rows + i * features;
        for (std::size_t d = 0; d < features; ++d) {
            const double term = static_cast<double>(row[d]) * weight;
            sums[d] += term;
            magnitudes[d] += std::fabs(term);
        }
        sums_.weights[range] += weight;
    }
}

template <typename T> std::size_t Samples<T>::encode(unsigned threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (view_.norms != nullptr) {
        return 0;
    }
    const std::size_t features = view_.features;
    const std::size_t lanes = kernels_->lanes;
    norms_ = AlignedArray<T>(rounded_up(view_.count, lanes));
    sums_.sums.assign(ranges_.count * features, 0.0);
    sums_.magnitudes.assign(ranges_.count * features, 0.0);
    sums_.weights.assign(ranges_.count, 0.0);
    std::vector<std::size_t> differing(ranges_.count, 0);
    run_tasks(ranges_.count, threads, [&](std::size_t range) {
        const DefaultArithmetic exact;
        AlignedArray<T> again(lanes * features);
        std::vector<double> squares(lanes);
        for (std::size_t row = ranges_.begin(range); row < ranges_.end(range); row += lanes) {
            T *const panel = panels_.data() + row * features;
            pack(row, again.data());
            if (std::memcmp(panel, again.data(), lanes * features * sizeof(T)) != 0) {
                pack(row, panel);
                ++differing[range];
            }
            std::fill(squares.begin(), squares.end(), 0.0);
            for (std::size_t d = 0; d < features; ++d) {
                for (std::size_t lane = 0; lane < lanes; ++lane) {
                    const auto value = static_cast<double>(panel[d * lanes + lane]);
                    squares[lane] += value * value;
                }
            }
            for (std::size_t lane = 0; lane < lanes; ++lane) {
                norms_.data()[row + lane] = static_cast<T>(std::sqrt(squares[lane]));
            }
        }
        add_up(range);
    });
    view_.norms = norms_.data();
    std::size_t count = 0;
    for (const std::size_t each : differing) {
        count += each;
    }
    return count;
}

template <typename T> double Samples<T>::square(unsigned threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (square_ < 0) {
        std::vector<double> parts(ranges_.count, 0.0);
        run_tasks(ranges_.count, threads, [&](std::size_t range) {
            const DefaultArithmetic exact;
            for (std::size_t i = ranges_.begin(range); i < ranges_.end(range); ++i) {
                const double weight = view_.weights == nullptr ? 1.0 : view_.weights[i];
                parts[range] += weight * kernels_->distance(view_.rows + i * view_.features,
                                                            frame_.origin.data(), view_.features);
            }
        });
        square_ = 0;
        for (const double part : parts) {
            square_ += part;
        }
    }
    return square_;
}

template class Samples<float>;
template class Samples<double>;

} // namespace lowtide::kmeans
