// The inner loops, written once for all instruction sets. Each kernels_<level>.cpp defines
//     LOWTIDE_KMEANS_LEVEL    a namespace, so that no two of them share an instantiation
//     LOWTIDE_KMEANS_TARGET   the instruction set
// and a class V for each element type: vectors of V::width lanes and the operations on them.
#include <cmath>
#include <cstring>
#include <utility>

#include "pass.hpp"

#define LOWTIDE_KMEANS_INLINE LOWTIDE_KMEANS_TARGET __attribute__((always_inline)) inline

// In this order; each needs the macros.
#include "kernel_tile.hpp"

#include "kernel_rows.hpp"

#include "kernel_panels.hpp"

namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL {

template <class V>
LOWTIDE_KMEANS_TARGET void assign(const Pass<typename V::T> &pass, Variant variant,
                                  std::size_t begin, std::size_t end, Watch &watch) {
    Panels<V> panels(pass, watch);
    if (variant == Variant::plain) {
        panels.template run<Variant::plain>(begin, end);
    } else if (variant == Variant::checked) {
        panels.template run<Variant::checked>(begin, end);
    } else {
        panels.template run<Variant::injected>(begin, end);
    }
}

template <class V> LOWTIDE_KMEANS_TARGET void sum(const Summation<typename V::T> &what) {
    const SampleView<typename V::T> &samples = *what.samples;
    const std::size_t features = what.last - what.first;
    for (std::size_t i = what.begin; i < what.end; ++i) {
        const std::size_t place =
            i % what.copies * what.clusters + static_cast<std::size_t>(what.labels[i]);
        const typename V::T *const row = samples.rows + i * samples.features + what.first;
        double *const sums = what.sums + place * what.stride;
        const double weight = samples.weights == nullptr ? 1.0 : samples.weights[i];
        if (samples.weights == nullptr) {
            add_row<V, false>(sums, row, features, weight);
        } else {
            add_row<V, true>(sums, row, features, weight);
        }
        if (what.counts != nullptr) {
            what.counts[place] += weight;
        }
    }
}

template <class V>
LOWTIDE_KMEANS_TARGET void total(const double *sums, std::size_t clusters, std::size_t stride,
                                 double *totals) {
    for (std::size_t d = 0; d < stride; ++d) {
        totals[d] = 0;
    }
    for (std::size_t k = 0; k < clusters; ++k) {
        for (std::size_t d = 0; d < stride; ++d) {
            totals[d] += sums[k * stride + d];
        }
    }
}

template <class V>
constexpr Kernels<typename V::T> table{lanes_of<V>, V::columns,   &assign<V>, &sum<V>,
                                       &total<V>,   &distance<V>, &pack<V>};

} // namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL
