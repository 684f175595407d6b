// Part of kernels.hpp: work on the samples' rows one by one.
namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL {

// Add a vector's worth of a row's elements, of which `rest` are left, to sums, which have room for
// whole vectors.
template <class V, bool is_weighted>
LOWTIDE_KMEANS_INLINE void add_vector(double *sums, const typename V::T *row, std::size_t rest,
                                      double weight) {
    using Wide = typename V::Wide;
    typename Wide::R x = V::widened(row, rest);
    if constexpr (is_weighted) {
        x = Wide::multiply(x, Wide::broadcast(weight));
    }
    Wide::store(sums, Wide::add(Wide::load(sums), x));
}

template <class V>
LOWTIDE_KMEANS_TARGET double distance(const typename V::T *a, const typename V::T *b,
                                      std::size_t features) {
    using Wide = typename V::Wide;
    typename Wide::R squares = Wide::broadcast(0);
    for (std::size_t d = 0; d < features; d += Wide::width) {
        const std::size_t rest = features - d;
        const typename Wide::R away =
            Wide::subtract(V::widened(a + d, rest), V::widened(b + d, rest));
        squares = Wide::fma(away, away, squares);
    }
    return Wide::total(squares);
}

// A panel of `count` rows: (row - origin) * scale, zeros in the other lanes. Returns the largest
// magnitude, or NaN if an element is not finite.
template <class V>
LOWTIDE_KMEANS_TARGET typename V::T pack(const typename V::T *rows, std::size_t count,
                                         std::size_t features, const typename V::T *origin,
                                         typename V::T scale, typename V::T *panel) {
    using R = typename V::R;
    constexpr std::size_t lanes = lanes_of<V>;
    constexpr std::size_t block = 16; // features whose part of a panel stays in the first cache
    const R factor = V::broadcast(scale);
    const R zero = V::broadcast(0);
    R most = zero;
    R not_finite = zero;
    for (std::size_t first = 0; first < features; first += block) {
        const std::size_t last = std::min(features, first + block);
        for (std::size_t lane = 0; lane < count; ++lane) {
            for (std::size_t d = first; d < last; ++d) {
                panel[d * lanes + lane] = rows[lane * features + d];
            }
        }
        for (std::size_t d = first; d < last; ++d) {
            std::fill(panel + d * lanes + count, panel + (d + 1) * lanes, origin[d]);
            for (std::size_t m = 0; m < vectors; ++m) {
                typename V::T *const place = panel + d * lanes + m * V::width;
                const R away = V::subtract(V::load(place), V::broadcast(origin[d]));
                const R value = V::multiply(away, factor);
                V::store(place, value);
                const R magnitude = V::magnitude(value);
                most = V::blend(V::less(most, magnitude), magnitude, most);
                not_finite = V::fma(value, zero, not_finite);
            }
        }
    }
    alignas(64) typename V::T each[2][V::width];
    V::store(each[0], most);
    V::store(each[1], not_finite);
    typename V::T result = 0;
    for (std::size_t i = 0; i < V::width; ++i) {
        result = std::max(result, each[0][i]) + each[1][i]; // the latter is 0 or NaN
    }
    return result;
}

// One sample's part of what State holds.
template <typename T> struct Row {
    T best, index, sum, check;
};

// A sample again, on its own: centroids in the lanes instead of samples, the same operations in
// the same order, so that what was right comes out again to the last bit. `samples` is the
// sample's first feature in its panel.
template <class V>
LOWTIDE_KMEANS_TARGET void redo_tile(const Centroids<typename V::T> &centroids, const Tile &tile,
                                     const typename V::T *samples, Row<typename V::T> &row) {
    using T = typename V::T;
    T acc[V::columns];
    T total[V::columns];
    const T *const starts = centroids.starts.data() + tile.starts;
    const bool starts_first = centroids.features <= few_features;
    for (std::size_t begin = 0; begin < centroids.features; begin += feature_block) {
        for (std::size_t j = 0; j < tile.columns; ++j) {
            acc[j] = starts_first ? starts[j] : T{0};
        }
        const std::size_t end = std::min(centroids.features, begin + feature_block);
        for (std::size_t d = begin; d < end; ++d) {
            const T x = samples[d * lanes_of<V>];
            const T *const values = centroids.values.data() + tile.values + d * tile.columns;
            for (std::size_t j = 0; j < tile.columns; ++j) {
                acc[j] = V::fma_one(x, values[j], acc[j]);
            }
        }
        for (std::size_t j = 0; j < tile.columns; ++j) {
            total[j] = begin == 0 ? acc[j] : total[j] + acc[j];
        }
    }
    for (std::size_t j = 0; j < tile.columns; ++j) {
        acc[j] = starts_first ? total[j] : total[j] + starts[j];
    }
    const std::size_t used = tile.columns - (tile.ends_group ? 1 : 0);
    T sum = 0;
    for (std::size_t j = 0; j < used; ++j) {
        if (acc[j] < row.best) {
            row.best = acc[j];
            row.index = centroids.numbers.data()[tile.starts + j];
        }
        sum = j == 0 ? acc[j] : j % 2 == 0 ? sum + acc[j] : sum - acc[j];
    }
    row.sum += sum;
    row.check = tile.ends_group ? acc[used] : row.check;
}

} // namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL
