// Part of kernels.hpp: one tile of centroids against one panel of samples.
namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL {

constexpr std::size_t vectors = 2; // of samples, in a panel
template <class V> constexpr std::size_t lanes_of = vectors * V::width;

// Running minimum of a panel's samples, and the checksum of the group at work. The checked
// variants keep the minimum twice, by other operations: `best` by min, `best_again` by comparison
// and selection, which the index follows. Whatever goes wrong in one of the two does not reach the
// other, so they differ where the index may be wrong.
template <class V> struct State {
    typename V::R best[vectors], index[vectors];
    typename V::R best_again[vectors];
    typename V::R sum[vectors], check[vectors];
};

template <class V> struct TileWork {
    using T = typename V::T;
    const Tile *tile;
    const T *samples; // the panel
    const T *values;  // the tile's
    const T *starts;
    const T *numbers;
    std::size_t features;
    std::size_t row;    // of the panel's first sample
    Span<Fault> faults; // of the panel
};

template <class V, int columns>
LOWTIDE_KMEANS_INLINE void multiply(typename V::R (&acc)[columns][vectors],
                                    const typename V::T *samples, const typename V::T *values,
                                    std::size_t features) {
    for (std::size_t d = 0; d < features; ++d) {
        const typename V::R x0 = V::load(samples);
        const typename V::R x1 = V::load(samples + V::width);
#pragma GCC unroll 16
        for (int j = 0; j < columns; ++j) {
            const typename V::R c = V::broadcast(values[j]);
            acc[j][0] = V::fma(x0, c, acc[j][0]);
            acc[j][1] = V::fma(x1, c, acc[j][1]);
        }
        samples += lanes_of<V>;
        values += columns;
    }
}

// Accumulators of a tile: -2 x.c, feature after feature, and |c|^2. That comes last, because it is
// the largest term and each feature would round to its size; of a few features it starts the sum,
// which saves the addition.
template <class V, int columns>
LOWTIDE_KMEANS_INLINE void accumulate(typename V::R (&acc)[columns][vectors],
                                      const TileWork<V> &work) {
    const bool starts_first = work.features <= few_features;
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) {
        acc[j][0] = acc[j][1] = starts_first ? V::broadcast(work.starts[j]) : V::broadcast(0);
    }
    typename V::R total[columns][vectors];
    for (std::size_t begin = 0;; begin += feature_block) {
        multiply<V, columns>(acc, work.samples + begin * lanes_of<V>, work.values + begin * columns,
                             std::min(feature_block, work.features - begin));
        const bool is_last = begin + feature_block >= work.features;
        if (is_last && begin == 0) {
            break;
        }
#pragma GCC unroll 16
        for (int j = 0; j < columns; ++j) {
#pragma GCC unroll 2
            for (std::size_t m = 0; m < vectors; ++m) {
                total[j][m] = begin == 0 ? acc[j][m] : V::add(total[j][m], acc[j][m]);
                acc[j][m] = is_last ? total[j][m] : V::broadcast(0);
            }
        }
        if (is_last) {
            break;
        }
    }
    if (!starts_first) {
#pragma GCC unroll 16
        for (int j = 0; j < columns; ++j) {
            acc[j][0] = V::add(acc[j][0], V::broadcast(work.starts[j]));
            acc[j][1] = V::add(acc[j][1], V::broadcast(work.starts[j]));
        }
    }
}

// Bring the first `used` columns into the running minimum and the sum under the checksum. Of
// equal ones the first stays. Signs alternate and each tile has a sum
// of its own first: sums stay near nought, and round less.
template <class V, int columns, int used, Variant variant>
LOWTIDE_KMEANS_INLINE void take(const typename V::R (&acc)[columns][vectors],
                                const TileWork<V> &work, State<V> &state) {
#pragma GCC unroll 2
    for (std::size_t m = 0; m < vectors; ++m) {
        typename V::R best = state.best[m], index = state.index[m];
        [[maybe_unused]] typename V::R best_again, sum;
        if constexpr (variant != Variant::plain) {
            best_again = state.best_again[m];
            sum = V::broadcast(0);
        }
#pragma GCC unroll 16
        for (int j = 0; j < used; ++j) {
            const typename V::R number = V::broadcast(work.numbers[j]);
            typename V::Mask nearer;
            if constexpr (variant == Variant::plain) {
                nearer = V::less(acc[j][m], best);
            } else {
                nearer = V::less(acc[j][m], best_again);
            }
            best = V::min(acc[j][m], best);
            index = V::blend(nearer, number, index);
            if constexpr (variant != Variant::plain) {
                best_again = V::blend(nearer, acc[j][m], best_again);
                sum = j == 0       ? acc[j][m]
                      : j % 2 == 0 ? V::add(sum, acc[j][m])
                                   : V::subtract(sum, acc[j][m]);
            }
        }
        state.best[m] = best;
        state.index[m] = index;
        if constexpr (variant != Variant::plain) {
            state.best_again[m] = best_again;
            state.sum[m] = V::add(state.sum[m], sum);
        }
    }
}

template <class V>
LOWTIDE_KMEANS_INLINE void flip_lane(typename V::R (&lanes)[vectors], std::size_t lane,
                                     Fault &fault) {
    alignas(64) typename V::T values[lanes_of<V>];
    V::store(values, lanes[0]);
    V::store(values + V::width, lanes[1]);
    flip(values[lane], fault);
    lanes[0] = V::load(values);
    lanes[1] = V::load(values + V::width);
}

template <class V, int columns>
LOWTIDE_KMEANS_TARGET void flip_accumulators(typename V::R (&acc)[columns][vectors],
                                             const TileWork<V> &work) {
    for (Fault &fault : work.faults) {
        const std::size_t column = fault.column - work.tile->first;
        const int used = columns - (work.tile->ends_group ? 1 : 0);
        if (fault.site == Site::acc && column < static_cast<std::size_t>(used)) {
            flip_lane<V>(acc[column], fault.row - work.row, fault);
        } else if (fault.site == Site::checksum && work.tile->ends_group &&
                   fault.column == work.tile->group) {
            flip_lane<V>(acc[columns - 1], fault.row - work.row, fault);
        }
    }
}

template <class V>
LOWTIDE_KMEANS_TARGET void flip_minima(State<V> &state, const TileWork<V> &work) {
    for (Fault &fault : work.faults) {
        const std::size_t used = work.tile->columns - (work.tile->ends_group ? 1 : 0);
        if (fault.column < work.tile->first || fault.column >= work.tile->first + used) {
            continue;
        }
        const std::size_t lane = fault.row - work.row;
        if (fault.site == Site::best) {
            flip_lane<V>(state.best, lane, fault);
        } else if (fault.site == Site::index) {
            flip_lane<V>(state.index, lane, fault);
        } else if (fault.site == Site::best_again) {
            flip_lane<V>(state.best_again, lane, fault);
        }
    }
}

template <class V, int columns, Variant variant>
LOWTIDE_KMEANS_TARGET void run_tile(const TileWork<V> &work, State<V> &state) {
    typename V::R acc[columns][vectors];
    accumulate<V, columns>(acc, work);
    if constexpr (variant == Variant::injected) {
        flip_accumulators<V, columns>(acc, work);
    }
    if constexpr (variant == Variant::plain) {
        take<V, columns, columns, variant>(acc, work, state);
    } else if (work.tile->ends_group) {
        take<V, columns, columns - 1, variant>(acc, work, state);
        state.check[0] = acc[columns - 1][0];
        state.check[1] = acc[columns - 1][1];
    } else {
        take<V, columns, columns, variant>(acc, work, state);
    }
    if constexpr (variant == Variant::injected) {
        flip_minima<V>(state, work);
    }
}

} // namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL
