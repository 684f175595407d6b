// Sums of the clusters over a part of the samples, and their check.
#pragma once

#include <cstddef>
#include <vector>

#include "samples.hpp"

namespace lowtide::kmeans {

template <typename T> struct SumRequest {
    const Samples<T> *samples;
    const std::int32_t *labels;
    std::size_t clusters;
    std::size_t stride; // between clusters, where the results go
    Mode mode;
    double kappa; // see Request::kappa_sums
    Span<Fault> faults;
};

// Of ranges [first_range, end_range) of rows and of features [first, last).
template <typename T> class PartialSums {
  public:
    PartialSums(const SumRequest<T> &request, std::size_t first_range, std::size_t end_range,
                std::size_t first, std::size_t last);

    // Rows must come in order.
    void add(std::size_t begin, std::size_t end);

    // Check, and write into [clusters][stride] and, if not null, [clusters].
    void finish(double *sums, double *weights, Counts &counts);

  private:
    std::size_t begin() const { return request_.samples->ranges().begin(first_range_); }
    std::size_t end() const { return request_.samples->ranges().end(end_range_ - 1); }
    Summation<T> summation(std::size_t begin, std::size_t end);
    void flip_after(std::size_t row, Fault &fault);
    void combine();   // the copies, into the first
    void add_again(); // all rows, one element at a time
    double residual();
    void check(Counts &counts);

    const SumRequest<T> request_;
    std::size_t first_range_, end_range_;
    std::size_t first_, last_;
    std::size_t stride_;
    std::size_t copies_;
    AlignedArray<double> sums_;   // [copies][clusters][stride], features from first_ on
    std::vector<double> weights_; // [copies][clusters]
};

} // namespace lowtide::kmeans
