// One pass: every sample to its nearest centroid, and the sums of the clusters.
#pragma once

#include <cstddef>
#include <cstdint>

#include "faults.hpp"
#include "samples.hpp"

namespace lowtide::kmeans {

template <typename T> struct Request {
    Span<const T> centroids; // (count, features)
    std::size_t count = 0;
    Mode mode = Mode::off;
    double kappa = 1;      // thresholds of distances, see packed()
    double kappa_sums = 1; // thresholds of sums, in units of u64 * sqrt(rows) * sum of |terms|
    unsigned threads = 1;
    Span<Fault> faults; // to put in, sorted by row; the log is written into them
};

// Where results go; all are written.
struct Results {
    Span<std::int32_t> labels;
    Span<double> distances; // or empty
    Span<double> sums;      // (count, features)
    Span<double> weights;   // of the clusters
};

struct Outcome {
    double inertia = 0; // from the distances, or where there are none from the sums
    Counts counts;
};

// Throws std::invalid_argument for sizes that do not fit. The same bits for any number of threads.
template <typename T>
Outcome assign(Samples<T> &samples, const Request<T> &request, const Results &results);

} // namespace lowtide::kmeans
