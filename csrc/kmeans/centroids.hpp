// Centroids made ready for one pass.
#pragma once

#include <cstddef>

#include "pass.hpp"
#include "samples.hpp"

namespace lowtide::kmeans {

// Pack `count` rows; with a checksum at the end of each group if `kappa` is positive, in which case
// thresholds are kappa * u * (2 |x| |C| + |n|) for the group's matrix of centroids C and vector
// of squared norms n.
template <typename T>
Centroids<T> packed(const T *rows, std::size_t count, const Samples<T> &samples, double kappa,
                    Span<Fault> faults);

// Whether both have the same bits where a pass reads them.
template <typename T> bool same(const Centroids<T> &a, const Centroids<T> &b);

} // namespace lowtide::kmeans
