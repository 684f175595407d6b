// The inner loops, written once for all instruction sets. Each kernels_<level>.cpp defines
//     LOWTIDE_KMEANS_LEVEL    a namespace, so that no two of them share an instantiation
//     LOWTIDE_KMEANS_TARGET   the instruction set
// and a class V for each element type: vectors of V::width lanes and the operations on them.
#include <cmath>
#include <cstring>
#include <utility>

#include "pass.hpp"

#define LOWTIDE_KMEANS_INLINE LOWTIDE_KMEANS_TARGET __attribute__((always_inline)) inline

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

// The widest vectors of float64 below stand for `features` elements, of which a last vector may
// have fewer; sums have room for whole vectors.
template <class V, bool is_weighted>
LOWTIDE_KMEANS_INLINE void add_row(double *sums, const typename V::T *row, std::size_t features,
                                   double weight) {
    using Wide = typename V::Wide;
    const typename Wide::R factor = Wide::broadcast(weight);
    for (std::size_t d = 0; d < features; d += Wide::width) {
        typename Wide::R x = V::widened(row + d, features - d);
        if constexpr (is_weighted) {
            x = Wide::multiply(x, factor);
        }
        Wide::store(sums + d, Wide::add(Wide::load(sums + d), x));
    }
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

// How far a checksum is off, in thresholds; not below 1 for anything that is not a number.
template <typename T> double residual(T sum, T check, const Threshold<T> &threshold, T norm) {
    const T limit = threshold.slope * norm + threshold.level;
    const T delta = std::fabs(sum - check);
    if (delta == 0) {
        return 0;
    }
    const double ratio = static_cast<double>(delta) / static_cast<double>(limit);
    return ratio >= 0 ? ratio : HUGE_VAL;
}

template <class V> class Panels {
  public:
    using T = typename V::T;

    LOWTIDE_KMEANS_TARGET Panels(const Pass<T> &pass, Watch &watch)
        : pass_(pass), samples_(pass.samples), centroids_(*pass.centroids), watch_(watch),
          counts_(watch.counts) {}

    template <Variant variant> LOWTIDE_KMEANS_TARGET void run(std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; row += lanes_of<V>) {
            run_panel<variant>(row, std::min(lanes_of<V>, end - row));
        }
        if constexpr (variant != Variant::plain) {
            const std::size_t checks = centroids_.thresholds.size() + 1;
            counts_.checks += pass_.mode == Mode::off ? 0 : (end - begin) * checks;
            watch_.rows += end - begin;
        }
    }

  private:
    using RunTile = void (*)(const TileWork<V> &, State<V> &);

    template <Variant variant, int... columns>
    static RunTile runner(std::size_t count, std::integer_sequence<int, columns...>) {
        static constexpr RunTile runners[] = {&run_tile<V, columns + 1, variant>...};
        return runners[count - 1];
    }

    const T *panel_at(std::size_t row) const { return samples_.panels + row * samples_.features; }

    Span<Fault> faults_at(std::size_t row) const {
        const auto below = [](const Fault &fault, std::size_t r) { return fault.row < r; };
        Fault *const first = std::lower_bound(pass_.faults.begin(), pass_.faults.end(), row, below);
        Fault *const last = std::lower_bound(first, pass_.faults.end(), row + lanes_of<V>, below);
        return {first, static_cast<std::size_t>(last - first)};
    }

    template <Variant variant>
    LOWTIDE_KMEANS_TARGET void run_panel(std::size_t row, std::size_t count) {
        State<V> state;
        for (std::size_t m = 0; m < vectors; ++m) {
            state.best[m] = state.best_again[m] = V::broadcast(static_cast<T>(HUGE_VAL));
            state.index[m] = state.sum[m] = V::broadcast(0);
        }
        TileWork<V> work;
        work.samples = panel_at(row);
        work.features = samples_.features;
        work.row = row;
        if constexpr (variant == Variant::injected) {
            work.faults = faults_at(row);
        }
        std::uint64_t wrong = 0; // a bit for each sample of the panel
        for (const Tile &tile : centroids_.tiles) {
            work.tile = &tile;
            work.values = centroids_.values.data() + tile.values;
            work.starts = centroids_.starts.data() + tile.starts;
            work.numbers = centroids_.numbers.data() + tile.starts;
            runner<variant>(tile.columns, std::make_integer_sequence<int, V::columns>())(work,
                                                                                         state);
            if constexpr (variant != Variant::plain) {
                if (tile.ends_group) {
                    wrong |= check_group(state, row, tile.group);
                }
            }
        }
        const std::uint64_t unreadable = store_labels(state, row, count);
        if constexpr (variant != Variant::plain) {
            wrong |= unreadable;
            for (std::size_t m = 0; m < vectors; ++m) {
                const std::uint64_t differ = V::differ(state.best[m], state.best_again[m]);
                wrong |= differ << (m * V::width);
            }
            wrong &= ~std::uint64_t{0} >> (64 - count); // lanes without a sample do not matter
            if (wrong != 0 && pass_.mode != Mode::off) {
                put_right(wrong, row);
            }
        }
    }

    // Returns the samples whose index is no code word: a bit of it is flipped. It must not lead out
    // of the array, whatever is done about it.
    LOWTIDE_KMEANS_INLINE std::uint64_t store_labels(const State<V> &state, std::size_t row,
                                                     std::size_t count) {
        alignas(64) T index[lanes_of<V>];
        alignas(64) std::int32_t labels[lanes_of<V>];
        V::store(index, state.index[0]);
        V::store(index + V::width, state.index[1]);
        bool is_readable = true;
        for (std::size_t i = 0; i < lanes_of<V>; ++i) {
            const Code<T> code = code_in(index[i]);
            labels[i] = static_cast<std::int32_t>(number_in(code));
            is_readable &= is_readable_code(code);
        }
        std::memcpy(pass_.labels + row, labels, count * sizeof(labels[0]));
        return is_readable ? 0 : find_unreadable(index, row, count);
    }

    LOWTIDE_KMEANS_INLINE bool is_readable_code(Code<T> code) const {
        return is_code(code) & (number_in(code) < centroids_.count);
    }

    LOWTIDE_KMEANS_TARGET __attribute__((noinline)) std::uint64_t
    find_unreadable(const T *index, std::size_t row, std::size_t count) {
        std::uint64_t found = 0;
        for (std::size_t i = 0; i < count; ++i) {
            if (!is_readable_code(code_in(index[i]))) {
                found |= std::uint64_t{1} << i;
                pass_.labels[row + i] = 0;
            }
        }
        return found;
    }

    // Which samples' sums do not agree with the checksum. The common case is one comparison: no
    // residual above the largest that was seen so far in these rows, itself below the limit.
    LOWTIDE_KMEANS_INLINE std::uint64_t check_group(State<V> &state, std::size_t row,
                                                    std::size_t group) {
        const Threshold<T> &threshold = centroids_.thresholds[group];
        const typename V::R slope = V::broadcast(threshold.slope * static_cast<T>(watch_.seen));
        const typename V::R level = V::broadcast(threshold.level * static_cast<T>(watch_.seen));
        std::uint64_t above = 0;
        for (std::size_t m = 0; m < vectors; ++m) {
            const typename V::R norms = V::load(samples_.norms + row + m * V::width);
            const typename V::R limit = V::add(V::multiply(slope, norms), level);
            const typename V::R delta = V::magnitude(V::subtract(state.sum[m], state.check[m]));
            above |= static_cast<std::uint64_t>(V::not_within(delta, limit)) << (m * V::width);
        }
        if (above != 0) {
            above = examine(state, above, row, group);
        }
        state.sum[0] = state.sum[1] = V::broadcast(0);
        return above;
    }

    // Of the samples `above`, those that an error explains. A sum that its sample gives again, bit
    // for bit, on another path was rounded, not wrong, as long as rounding can do so much.
    LOWTIDE_KMEANS_TARGET __attribute__((noinline)) std::uint64_t
    examine(const State<V> &state, std::uint64_t above, std::size_t row, std::size_t group) {
        alignas(64) T sums[lanes_of<V>];
        alignas(64) T checks[lanes_of<V>];
        for (std::size_t m = 0; m < vectors; ++m) {
            V::store(sums + m * V::width, state.sum[m]);
            V::store(checks + m * V::width, state.check[m]);
        }
        std::uint64_t wrong = 0;
        for (std::size_t lane = 0; lane < lanes_of<V>; ++lane) {
            if ((above >> lane & 1u) == 0 || row + lane >= samples_.count) {
                continue;
            }
            const double found = residual(sums[lane], checks[lane], centroids_.thresholds[group],
                                          samples_.norms[row + lane]);
            const bool is_within = found <= watch_.limit;
            if (!is_within && !is_rounding(sums[lane], checks[lane], found, row + lane, group)) {
                wrong |= std::uint64_t{1} << lane;
                continue;
            }
            watch_.held(found, is_within, centroids_.most_slack);
        }
        return wrong;
    }

    LOWTIDE_KMEANS_TARGET bool is_rounding(T sum, T check, double found, std::size_t row,
                                           std::size_t group) const {
        Row<T> again{static_cast<T>(HUGE_VAL), 0, 0, 0};
        for (const Tile &tile : centroids_.tiles) {
            if (tile.group == group) {
                redo_tile<V>(centroids_, tile, sample_at(row), again);
            }
        }
        return found <= centroids_.most_slack && again.sum == sum && again.check == check;
    }

    const T *sample_at(std::size_t row) const {
        const std::size_t lane = row % lanes_of<V>;
        return panel_at(row - lane) + lane;
    }

    LOWTIDE_KMEANS_TARGET __attribute__((noinline)) void put_right(std::uint64_t wrong,
                                                                   std::size_t row) {
        for (; wrong != 0; wrong >>= 1, ++row) {
            if ((wrong & 1u) == 0) {
                continue;
            }
            ++counts_.detected;
            if (pass_.mode == Mode::detect) {
                ++counts_.uncorrected;
            } else if (pass_.mode == Mode::correct && redo(row)) {
                ++counts_.corrected;
            } else {
                pass_.labels[row] = nearest(samples_, centroids_, &distance<V>, row);
                ++counts_.recomputed;
            }
        }
    }

    // The label as a clean pass finds it; false if the sums still do not agree.
    LOWTIDE_KMEANS_TARGET bool redo(std::size_t row) {
        Row<T> again{static_cast<T>(HUGE_VAL), 0, 0, 0};
        for (const Tile &tile : centroids_.tiles) {
            redo_tile<V>(centroids_, tile, sample_at(row), again);
            if (tile.ends_group) {
                const double found = residual(
                    again.sum, again.check, centroids_.thresholds[tile.group], samples_.norms[row]);
                if (!(found <= 1)) {
                    return false;
                }
                again.sum = 0;
            }
        }
        pass_.labels[row] = static_cast<std::int32_t>(number_in(code_in(again.index)));
        return true;
    }

    const Pass<T> pass_;
    const SampleView<T> samples_;
    const Centroids<T> &centroids_;
    Watch &watch_;
    Counts &counts_;
};

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
constexpr Kernels<typename V::T> table{lanes_of<V>, V::columns, &assign<V>,
                                       &sum<V>,     &total<V>,  &distance<V>};

} // namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL
