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

// `is_short`: a row is one vector. Sums of so few features take as long as the distances do, and
// the general loop would double that.
template <class V, bool is_weighted, bool is_short>
LOWTIDE_KMEANS_TARGET void sum_rows(const Summation<typename V::T> &work) {
    const Summation<typename V::T> what = work; // a copy, which the stores below cannot change
    const typename V::T *const rows = what.samples->rows + what.first;
    const std::size_t pitch = what.samples->features;
    const double *const weights = what.samples->weights;
    const std::size_t features = what.last - what.first;
    for (std::size_t i = what.begin; i < what.end; ++i) {
        const std::size_t copy = i & (what.copies - 1);
        const std::size_t place = copy * what.clusters + static_cast<std::size_t>(what.labels[i]);
        const double weight = is_weighted ? weights[i] : 1.0;
        double *const sums = what.sums + place * what.stride;
        if constexpr (is_short) {
            add_vector<V, is_weighted>(sums, rows + i * pitch, features, weight);
        } else {
            for (std::size_t d = 0; d < features; d += V::Wide::width) {
                add_vector<V, is_weighted>(sums + d, rows + i * pitch + d, features - d, weight);
            }
        }
        what.counts[place] += weight;
    }
}

template <class V> LOWTIDE_KMEANS_TARGET void sum(const Summation<typename V::T> &what) {
    const bool is_short = what.last - what.first <= V::Wide::width;
    if (what.samples->weights == nullptr) {
        is_short ? sum_rows<V, false, true>(what) : sum_rows<V, false, false>(what);
    } else {
        is_short ? sum_rows<V, true, true>(what) : sum_rows<V, true, false>(what);
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
