#include "sums.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lowtide::kmeans {
namespace {

// Sums that several samples in a row add to wait for each other; copies of them do not. As many
// bytes of copies stay in the first cache.
constexpr std::size_t copies_when_small = 4;
constexpr std::size_t small_bytes = 16384;

} // namespace

template <typename T>
PartialSums<T>::PartialSums(const SumRequest<T> &request, std::size_t first_range,
                            std::size_t end_range, std::size_t first, std::size_t last)
    : request_(request), first_range_(first_range), end_range_(end_range), first_(first),
      last_(last) {
    stride_ = (last - first + sum_lanes - 1) / sum_lanes * sum_lanes;
    const std::size_t size = request.clusters * stride_;
    copies_ = size * sizeof(double) * copies_when_small <= small_bytes ? copies_when_small : 1;
    sums_ = AlignedArray<double>(size * copies_);
    std::fill(sums_.data(), sums_.data() + sums_.size(), 0.0);
    weights_.assign(request.clusters * copies_, 0.0);
}

template <typename T> Summation<T> PartialSums<T>::summation(std::size_t begin, std::size_t end) {
    return {
        &request_.samples->view(), request_.labels,   begin,   end,    first_, last_, sums_.data(),
        weights_.data(),           request_.clusters, stride_, copies_};
}

template <typename T> void PartialSums<T>::add(std::size_t begin, std::size_t end) {
    const auto sum = request_.samples->kernels().sum;
    std::size_t done = begin;
    for (Fault &fault : request_.faults) {
        const bool is_mine =
            fault.site == Site::count
                ? first_ == 0
                : fault.site == Site::sum && fault.column >= first_ && fault.column < last_;
        if (is_mine && fault.row >= begin && fault.row < end) {
            sum(summation(done, fault.row + 1));
            done = fault.row + 1;
            flip_after(fault.row, fault);
        }
    }
    sum(summation(done, end));
}

template <typename T> void PartialSums<T>::flip_after(std::size_t row, Fault &fault) {
    const std::size_t place =
        row % copies_ * request_.clusters + static_cast<std::size_t>(request_.labels[row]);
    if (fault.site == Site::sum) {
        flip(sums_.data()[place * stride_ + fault.column - first_], fault);
    } else {
        flip(weights_[place], fault);
    }
}

template <typename T> void PartialSums<T>::combine() {
    const std::size_t size = request_.clusters * stride_;
    for (std::size_t copy = 1; copy < copies_; ++copy) {
        for (std::size_t i = 0; i < size; ++i) {
            sums_.data()[i] += sums_.data()[copy * size + i];
        }
        for (std::size_t k = 0; k < request_.clusters; ++k) {
            weights_[k] += weights_[copy * request_.clusters + k];
        }
    }
}

// Another path to the same bits: each element has the same terms in the same order.
template <typename T> void PartialSums<T>::add_again() {
    const SampleView<T> &samples = request_.samples->view();
    std::fill(sums_.data(), sums_.data() + sums_.size(), 0.0);
    std::fill(weights_.begin(), weights_.end(), 0.0);
    for (std::size_t i = begin(); i < end(); ++i) {
        const std::size_t place =
            i % copies_ * request_.clusters + static_cast<std::size_t>(request_.labels[i]);
        const double weight = samples.weights == nullptr ? 1.0 : samples.weights[i];
        for (std::size_t d = first_; d < last_; ++d) {
            sums_.data()[place * stride_ + d - first_] +=
                static_cast<double>(samples.rows[i * samples.features + d]) * weight;
        }
        weights_[place] += weight;
    }
    combine();
}

// The largest difference to what the sums must add up to, in thresholds.
template <typename T> double PartialSums<T>::residual() {
    const RangeSums &expected = request_.samples->range_sums();
    const std::size_t features = request_.samples->view().features;
    const bool is_counted = request_.samples->view().weights == nullptr;
    const double unit = request_.kappa * 0x1p-53 * std::sqrt(static_cast<double>(end() - begin()));
    std::vector<double> totals(stride_);
    request_.samples->kernels().total(sums_.data(), request_.clusters, stride_, totals.data());
    double most = 0;
    const auto compare = [&most](double found, double wanted, double threshold) {
        const double delta = std::fabs(found - wanted);
        const double ratio = delta == 0 ? 0 : delta / threshold;
        most = ratio <= most ? most : ratio; // NaN stays
    };
    for (std::size_t d = first_; d < last_; ++d) {
        double sum = 0;
        double magnitude = 0;
        for (std::size_t range = first_range_; range < end_range_; ++range) {
            sum += expected.sums[range * features + d];
            magnitude += expected.magnitudes[range * features + d];
        }
        compare(totals[d - first_], sum, unit * magnitude);
    }
    double weight = 0;
    double expected_weight = 0;
    for (std::size_t k = 0; k < request_.clusters; ++k) {
        weight += weights_[k];
    }
    for (std::size_t range = first_range_; range < end_range_; ++range) {
        expected_weight += expected.weights[range];
    }
    compare(weight, expected_weight, is_counted ? 0 : unit * expected_weight);
    return most;
}

template <typename T> void PartialSums<T>::check(Counts &counts) {
    counts.checks += last_ - first_ + 1;
    const double found = residual();
    if (found <= 1) {
        counts.max_residual = std::max(counts.max_residual, found);
        return;
    }
    const std::size_t size = request_.clusters * stride_;
    const std::vector<double> sums(sums_.data(), sums_.data() + size);
    const std::vector<double> weights(weights_.begin(), weights_.begin() + request_.clusters);
    add_again();
    if (std::memcmp(sums.data(), sums_.data(), size * sizeof(double)) == 0 &&
        std::memcmp(weights.data(), weights_.data(), request_.clusters * sizeof(double)) == 0) {
        counts.max_residual = std::max(counts.max_residual, found); // rounded, not wrong
        return;
    }
    ++counts.detected;
    if (request_.mode == Mode::detect) {
        std::copy(sums.begin(), sums.end(), sums_.data());
        std::copy(weights.begin(), weights.end(), weights_.begin());
        ++counts.uncorrected;
    } else if (residual() <= 1) {
        ++counts.recomputed;
    } else {
        ++counts.uncorrected;
    }
}

template <typename T> void PartialSums<T>::finish(double *sums, double *weights, Counts &counts) {
    combine();
    if (request_.mode != Mode::off) {
        check(counts);
    }
    for (std::size_t k = 0; k < request_.clusters; ++k) {
        const double *const from = sums_.data() + k * stride_;
        std::copy(from, from + (last_ - first_), sums + k * request_.stride + first_);
    }
    if (weights != nullptr) {
        std::copy(weights_.begin(), weights_.begin() + request_.clusters, weights);
    }
}

template class PartialSums<float>;
template class PartialSums<double>;

} // namespace lowtide::kmeans
