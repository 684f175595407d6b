// Part of kernels.hpp: labels of panel after panel, their checks, and what is done about errors.
namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL {

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

} // namespace lowtide::kmeans::LOWTIDE_KMEANS_LEVEL
