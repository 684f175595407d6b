#include "centroids.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace lowtide::kmeans {
namespace {

// Tiles of near-equal size, all but a group's last with an even number of columns, so that signs
// alternate through the group.
std::size_t tile_columns(std::size_t columns, std::size_t most) {
    const std::size_t tiles = (columns + most - 1) / most;
    const std::size_t each = (columns + tiles - 1) / tiles;
    return std::min(most, each + each % 2);
}

struct Group {
    std::size_t first, count;
};

std::vector<Group> groups_of(std::size_t count) {
    const std::size_t groups = (count + group_centroids - 1) / group_centroids;
    const std::size_t each = (count + groups - 1) / groups;
    std::vector<Group> made;
    for (std::size_t first = 0; first < count; first += each) {
        made.push_back({first, std::min(each, count - first)});
    }
    return made;
}

template <typename T> class Packing {
  public:
    Packing(const T *rows, std::size_t count, const Samples<T> &samples, bool is_checked,
            Span<Fault> faults)
        : frame_(samples.frame()), faults_(faults), is_checked_(is_checked) {
        const std::size_t features = samples.view().features;
        made_.rows = rows;
        made_.count = count;
        made_.features = features;
        std::vector<Group> groups = groups_of(count);
        if (!is_checked) {
            groups = {{0, count}};
        }
        const std::size_t columns = count + (is_checked ? groups.size() : 0);
        made_.values = AlignedArray<T>(columns * features);
        made_.starts = AlignedArray<T>(columns);
        made_.numbers = AlignedArray<T>(columns);
        lay_out(groups, samples.kernels().columns);
    }

    Centroids<T> fill(double kappa, T largest_sample) {
        const std::size_t features = made_.features;
        sum_.assign(features + 1, 0.0);
        double group_square = 0; // |C|^2
        double norm_square = 0;  // |n|^2
        double largest = 0;
        for (const Tile &tile : made_.tiles) {
            const std::size_t used = tile.columns - (tile.ends_group ? 1 : 0);
            for (std::size_t j = 0; j < used; ++j) {
                const double square = fill_column(tile, j);
                group_square += square;
                norm_square += square * square;
                largest = std::max(largest, square);
            }
            if (tile.ends_group) {
                fill_checksum(tile);
                add_threshold(kappa, group_square, norm_square);
                group_square = norm_square = 0;
            }
        }
        const double x = static_cast<double>(largest_sample) * std::sqrt(double(features));
        const double limit = static_cast<double>(std::numeric_limits<T>::max()) / 16;
        // Sums of a group included.
        made_.fits = (largest + 2 * x * std::sqrt(largest)) * group_centroids < limit;
        return std::move(made_);
    }

  private:
    void lay_out(const std::vector<Group> &groups, std::size_t most) {
        std::size_t column = 0;
        for (std::size_t g = 0; g < groups.size(); ++g) {
            const std::size_t columns = groups[g].count + (is_checked_ ? 1 : 0);
            const std::size_t each = tile_columns(columns, most);
            for (std::size_t begin = 0; begin < columns; begin += each) {
                const std::size_t width = std::min(each, columns - begin);
                const bool is_last = begin + width == columns;
                made_.tiles.push_back({groups[g].first + begin, width, column * made_.features,
                                       column, g, is_checked_ && is_last});
                column += width;
            }
        }
    }

    // Returns |c|^2.
    double fill_column(const Tile &tile, std::size_t j) {
        const std::size_t k = tile.first + j;
        const double sign = j % 2 == 0 ? 1.0 : -1.0;
        double square = 0;
        for (std::size_t d = 0; d < made_.features; ++d) {
            const T place = (made_.rows[k * made_.features + d] - frame_.origin[d]) * frame_.scale;
            const T value = -2 * place;
            made_.values.data()[tile.values + d * tile.columns + j] = value;
            sum_[d] += sign * static_cast<double>(value);
            square += static_cast<double>(place) * static_cast<double>(place);
        }
        T start = static_cast<T>(square);
        sum_[made_.features] += sign * static_cast<double>(start);
        for (Fault &fault : faults_) {
            if (fault.site == Site::norm && fault.column == k) {
                flip(start, fault);
            }
        }
        made_.starts.data()[tile.starts + j] = start;
        made_.numbers.data()[tile.starts + j] = lane_of<T>(k);
        return square;
    }

    void fill_checksum(const Tile &tile) {
        const std::size_t j = tile.columns - 1;
        for (std::size_t d = 0; d < made_.features; ++d) {
            made_.values.data()[tile.values + d * tile.columns + j] = static_cast<T>(sum_[d]);
        }
        made_.starts.data()[tile.starts + j] = static_cast<T>(sum_[made_.features]);
        made_.numbers.data()[tile.starts + j] = 0;
        std::fill(sum_.begin(), sum_.end(), 0.0);
    }

    void add_threshold(double kappa, double group_square, double norm_square) {
        const double unit = kappa * std::numeric_limits<T>::epsilon() / 2;
        made_.thresholds.push_back({static_cast<T>(unit * 2 * std::sqrt(group_square)),
                                    static_cast<T>(unit * std::sqrt(norm_square))});
        // Each accumulator rounds once for each feature of a block and for each block, their sum
        // once for each of them; together at most sqrt(group) times the unit above.
        const double features = static_cast<double>(std::min(made_.features, feature_block)) +
                                static_cast<double>(made_.features / feature_block);
        const double most = (features + group_centroids + 4) * std::sqrt(double(group_centroids));
        made_.most_slack = std::max(1.0, most / kappa);
    }

    const Frame<T> &frame_;
    Span<Fault> faults_;
    bool is_checked_;
    Centroids<T> made_;
    std::vector<double> sum_; // of a group's columns with their signs, the starts behind
};

template <typename T> bool same_bits(const AlignedArray<T> &a, const AlignedArray<T> &b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

} // namespace

template <typename T>
Centroids<T> packed(const T *rows, std::size_t count, const Samples<T> &samples, double kappa,
                    Span<Fault> faults) {
    Packing<T> packing(rows, count, samples, kappa > 0, faults);
    return packing.fill(kappa, samples.largest());
}

template <typename T> bool same(const Centroids<T> &a, const Centroids<T> &b) {
    const auto equal = [](const Threshold<T> &x, const Threshold<T> &y) {
        return x.slope == y.slope && x.level == y.level;
    };
    return same_bits(a.values, b.values) && same_bits(a.starts, b.starts) &&
           same_bits(a.numbers, b.numbers) && a.fits == b.fits &&
           std::equal(a.thresholds.begin(), a.thresholds.end(), b.thresholds.begin(),
                      b.thresholds.end(), equal);
}

template Centroids<float> packed(const float *, std::size_t, const Samples<float> &, double,
                                 Span<Fault>);
template Centroids<double> packed(const double *, std::size_t, const Samples<double> &, double,
                                  Span<Fault>);
template bool same(const Centroids<float> &, const Centroids<float> &);
template bool same(const Centroids<double> &, const Centroids<double> &);

} // namespace lowtide::kmeans
