#include "assign.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "centroids.hpp"
#include "common/default_arithmetic.hpp"
#include "common/thread_pool.hpp"
#include "sums.hpp"

namespace lowtide::kmeans {
namespace {

// Sums up to this size are made as the labels come, while the samples are still in a cache. Larger
// ones are made afterwards, a block of features at a time, so that they stay in one.
constexpr std::size_t fused_bytes = 262144;
constexpr std::size_t summed_features = 64;
constexpr std::size_t most_parts = 8;

// Additions that are work enough for a task.
constexpr std::size_t reduced_elements = 65536;

// Samples between two turns of labels and sums.
constexpr std::size_t chunk_bytes = 32768;
constexpr std::size_t most_chunk_panels = 16;

template <typename T> class Run {
  public:
    Run(Samples<T> &samples, const Request<T> &request, const Results &results)
        : samples_(samples), view_(samples.view()), request_(request), results_(results),
          ranges_(samples.ranges()) {
        const std::size_t features = view_.features;
        stride_ = (features + sum_lanes - 1) / sum_lanes * sum_lanes;
        is_fused_ = request.count * stride_ * sizeof(double) <= fused_bytes;
        const std::size_t blocks = is_fused_ ? 1 : (features - 1) / summed_features + 1;
        parts_ = is_fused_ ? ranges_.count : std::min(ranges_.count, (most_parts - 1) / blocks + 1);
    }

    Outcome run() {
        encode();
        sums_ = AlignedArray<double>(parts_ * request_.count * stride_);
        weights_.assign(parts_ * request_.count, 0.0);
        watches_.resize(ranges_.count);
        inertias_.assign(ranges_.count, 0.0);
        in_parallel(ranges_.count, [this](std::size_t range) { run_range(range); });
        if (!is_fused_) {
            sum_up();
        }
        reduce();
        outcome_.inertia = inertia();
        for (const Watch &each : watches_) {
            outcome_.counts.add(each.counts);
        }
        return outcome_;
    }

  private:
    // Work must not throw on a thread of the pool; the first exception is thrown here.
    void in_parallel(std::size_t tasks, const TaskFunction &work) const {
        std::exception_ptr failure;
        std::mutex mutex;
        run_tasks(tasks, request_.threads, [&](std::size_t task) {
            const DefaultArithmetic exact;
            try {
                work(task);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                failure = failure ? failure : std::current_exception();
            }
        });
        if (failure) {
            std::rethrow_exception(failure);
        }
    }

    bool is_checked() const { return request_.mode != Mode::off; }

    SumRequest<T> sum_request() const {
        return {&samples_,     results_.labels.data(), request_.count, stride_,
                request_.mode, request_.kappa_sums,    request_.faults};
    }

    // Packs the centroids; with checks twice, until two agree.
    void encode() {
        const DefaultArithmetic exact;
        const bool has_checksums = is_checked() || !request_.faults.empty();
        const double kappa = has_checksums ? request_.kappa : 0;
        const auto pack = [&](Span<Fault> faults) {
            return packed(request_.centroids.data(), request_.count, samples_, kappa, faults);
        };
        if (has_checksums) {
            const std::size_t differing = samples_.encode(request_.threads);
            outcome_.counts.detected += differing;
            outcome_.counts.recomputed += differing;
            view_ = samples_.view();
        }
        centroids_ = pack(request_.faults);
        if (!is_checked()) {
            return;
        }
        outcome_.counts.checks += request_.count;
        for (int tries = 0; tries < 3; ++tries) {
            Centroids<T> again = pack({});
            const bool is_same = same(centroids_, again);
            centroids_ = std::move(again);
            if (is_same) {
                return;
            }
            ++outcome_.counts.detected;
            if (request_.mode == Mode::detect) {
                ++outcome_.counts.uncorrected;
            } else {
                ++outcome_.counts.recomputed;
            }
        }
        ++outcome_.counts.uncorrected;
    }

    void run_range(std::size_t range) {
        const std::size_t lanes = samples_.kernels().lanes;
        const std::size_t bytes = lanes * view_.features * sizeof(T);
        const std::size_t panels =
            std::clamp<std::size_t>(chunk_bytes / bytes, 1, most_chunk_panels);
        std::vector<PartialSums<T>> sums;
        if (is_fused_) {
            sums.emplace_back(sum_request(), range, range + 1, 0, view_.features);
        }
        const std::size_t end = ranges_.end(range);
        for (std::size_t begin = ranges_.begin(range); begin < end; begin += panels * lanes) {
            const std::size_t stop = std::min(end, begin + panels * lanes);
            label(begin, stop, watches_[range]);
            for (PartialSums<T> &each : sums) {
                each.add(begin, stop);
            }
            if (!results_.distances.empty()) {
                inertias_[range] += measure(begin, stop);
            }
        }
        for (PartialSums<T> &each : sums) {
            each.finish(sums_.data() + range * request_.count * stride_,
                        weights_.data() + range * request_.count, watches_[range].counts);
        }
    }

    void label(std::size_t begin, std::size_t end, Watch &watch) {
        if (!centroids_.fits) {
            for (std::size_t row = begin; row < end; ++row) {
                results_.labels[row] = nearest(view_, centroids_, samples_.kernels().distance, row);
            }
            return;
        }
        const Variant variant = !request_.faults.empty() ? Variant::injected
                                : is_checked()           ? Variant::checked
                                                         : Variant::plain;
        samples_.kernels().assign(
            {view_, &centroids_, request_.mode, results_.labels.data(), request_.faults}, variant,
            begin, end, watch);
    }

    double measure(std::size_t begin, std::size_t end) {
        const std::size_t features = view_.features;
        double sum = 0;
        for (std::size_t row = begin; row < end; ++row) {
            const auto label = static_cast<std::size_t>(results_.labels[row]);
            const double square = samples_.kernels().distance(
                view_.rows + row * features, centroids_.rows + label * features, features);
            results_.distances[row] = square;
            sum += view_.weights == nullptr ? square : view_.weights[row] * square;
        }
        return sum;
    }

    // Sums that did not come with the labels: by parts of the rows and blocks of features.
    void sum_up() {
        const std::size_t blocks = (view_.features - 1) / summed_features + 1;
        std::vector<Counts> counts(parts_ * blocks);
        in_parallel(parts_ * blocks, [&](std::size_t task) {
            const std::size_t part = task / blocks;
            const std::size_t block = task % blocks;
            const std::size_t first_range = part * ranges_.count / parts_;
            const std::size_t end_range = (part + 1) * ranges_.count / parts_;
            const std::size_t first = block * summed_features;
            PartialSums<T> sums(sum_request(), first_range, end_range, first,
                                std::min(view_.features, first + summed_features));
            sums.add(ranges_.begin(first_range), ranges_.end(end_range - 1));
            sums.finish(sums_.data() + part * request_.count * stride_,
                        block == 0 ? weights_.data() + part * request_.count : nullptr,
                        counts[task]);
        });
        for (const Counts &each : counts) {
            outcome_.counts.add(each);
        }
    }

    // Parts in their order; with checks twice, until two agree.
    void reduce() {
        const std::size_t features = view_.features;
        const std::size_t work = std::max<std::size_t>(1, parts_ * features);
        const std::size_t each = std::max<std::size_t>(1, reduced_elements / work);
        const std::size_t tasks = (request_.count - 1) / each + 1;
        std::vector<Counts> counts(tasks);
        in_parallel(tasks, [&](std::size_t task) {
            std::vector<double> row(features + 1);
            std::vector<double> again(features + 1);
            const std::size_t end = std::min(request_.count, (task + 1) * each);
            for (std::size_t k = task * each; k < end; ++k) {
                reduce_cluster(k, row);
                if (is_checked()) {
                    reduce_cluster(k, again);
                    compare(k, row, again, counts[task]);
                }
                std::copy_n(row.data(), features, results_.sums.data() + k * features);
                results_.weights[k] = row[features];
            }
        });
        for (const Counts &each_count : counts) {
            outcome_.counts.add(each_count);
        }
    }

    // The cluster's sums and, behind them, its weight.
    void reduce_cluster(std::size_t k, std::vector<double> &row) const {
        std::fill(row.begin(), row.end(), 0.0);
        for (std::size_t part = 0; part < parts_; ++part) {
            const double *const from = sums_.data() + (part * request_.count + k) * stride_;
            for (std::size_t d = 0; d < view_.features; ++d) {
                row[d] += from[d];
            }
            row[view_.features] += weights_[part * request_.count + k];
        }
    }

    void compare(std::size_t k, std::vector<double> &row, std::vector<double> &again,
                 Counts &counts) const {
        ++counts.checks;
        for (int tries = 0; std::memcmp(row.data(), again.data(), row.size() * sizeof(double));
             ++tries) {
            ++counts.detected;
            if (request_.mode == Mode::detect || tries == 3) {
                ++counts.uncorrected;
                return;
            }
            ++counts.recomputed;
            row.swap(again);
            reduce_cluster(k, again);
        }
    }

    double inertia() {
        double sum = 0;
        if (!results_.distances.empty()) {
            for (const double each : inertias_) {
                sum += each;
            }
            return sum;
        }
        // About the origin, o: w |x-o|^2 - 2 (s - n o).(c - o) + n |c - o|^2.
        const std::vector<T> &origin = samples_.frame().origin;
        for (std::size_t k = 0; k < request_.count; ++k) {
            const double weight = results_.weights[k];
            for (std::size_t d = 0; d < view_.features; ++d) {
                const auto o = static_cast<double>(origin[d]);
                const double c = static_cast<double>(centroids_.rows[k * view_.features + d]) - o;
                const double s = results_.sums[k * view_.features + d] - weight * o;
                sum += c * (weight * c - 2 * s);
            }
        }
        return std::max(0.0, sum + samples_.square(request_.threads));
    }

    Samples<T> &samples_;
    SampleView<T> view_;
    const Request<T> &request_;
    const Results &results_;
    const Ranges ranges_;
    std::size_t stride_;
    bool is_fused_;
    std::size_t parts_;
    Centroids<T> centroids_;
    AlignedArray<double> sums_;   // [part][cluster][stride]
    std::vector<double> weights_; // [part][cluster]
    std::vector<Watch> watches_;  // [range]
    std::vector<double> inertias_;
    Outcome outcome_;
};

void check_size(const char *name, std::size_t found, std::size_t wanted) {
    if (found != wanted) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(found) +
                                    " elements, allowed is " + std::to_string(wanted));
    }
}

} // namespace

template <typename T>
Outcome assign(Samples<T> &samples, const Request<T> &request, const Results &results) {
    const SampleView<T> &view = samples.view();
    if (request.count == 0 || request.count > most_centroids) {
        throw std::invalid_argument("centroids: got " + std::to_string(request.count) +
                                    " rows, allowed is 1 to " + std::to_string(most_centroids));
    }
    check_size("centroids", request.centroids.size(), request.count * view.features);
    check_size("labels", results.labels.size(), view.count);
    check_size("sums", results.sums.size(), request.count * view.features);
    check_size("weights", results.weights.size(), request.count);
    if (!results.distances.empty()) {
        check_size("distances", results.distances.size(), view.count);
    }
    return Run<T>(samples, request, results).run();
}

template Outcome assign(Samples<float> &, const Request<float> &, const Results &);
template Outcome assign(Samples<double> &, const Request<double> &, const Results &);

} // namespace lowtide::kmeans
