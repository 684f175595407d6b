// What one pass over the samples works on, as the kernels see it.
//
// Samples stand in panels: `lanes` samples beside each other, one vector for each feature, so that
// a vector's lanes are samples. Minimum, checksum and threshold of a sample then never cross lanes,
// and no number of centroids leaves lanes idle. Centroids are broadcast, in tiles of as many as
// the accumulators have room for.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "aligned.hpp"
#include "common/span.hpp"
#include "faults.hpp"

namespace lowtide::kmeans {

enum class Level { generic, avx2, avx512 };

constexpr const char *name_of(Level level) {
    return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "generic";
}

// An accumulator runs over so many features, then joins a total: rounding errors of long sums
// grow with this, not with the number of features.
constexpr std::size_t feature_block = 256;

// Up to so many features |c|^2 is where an accumulator starts, else what it ends with.
constexpr std::size_t few_features = 16;

// Centroids under one checksum. More would make the check cheaper and blunter.
constexpr std::size_t group_centroids = 128;

// How a lane of T holds the number of a centroid: as bits that are only ever moved. The bytes of
// the number, and the exclusive or of them in the byte above, so that one flipped bit shows.
template <typename T> using Code = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

constexpr std::size_t most_centroids = std::size_t{1} << 24;

template <typename T> T lane_of(std::size_t number) {
    const auto code = static_cast<Code<T>>(number);
    const Code<T> fold = (code ^ code >> 8 ^ code >> 16) & 0xFFu;
    const Code<T> bits = code | fold << 24;
    T lane;
    std::memcpy(&lane, &bits, sizeof(lane));
    return lane;
}

template <typename T> Code<T> code_in(const T &lane) {
    Code<T> code;
    std::memcpy(&code, &lane, sizeof(code));
    return code;
}

template <typename C> constexpr C number_in(C code) { return code & 0xFFFFFFu; }

template <typename C> constexpr bool is_code(C code) {
    const C fold = (code ^ code >> 8 ^ code >> 16 ^ code >> 24) & 0xFFu;
    return (fold | (sizeof(C) == 8 ? code >> (4 * sizeof(C)) : 0)) == 0;
}

// Columns [first, first + columns) of a group, the last of which may be its checksum.
struct Tile {
    std::size_t first;   // number of its first centroid
    std::size_t columns; // of accumulators, the checksum included
    std::size_t values;  // where its [features][columns] lie in Centroids::values
    std::size_t starts;  // where its [columns] lie in Centroids::starts and ::numbers
    std::size_t group;
    bool ends_group; // the last column is the checksum
};

// The threshold of a row's checksum is slope * |x| + level.
template <typename T> struct Threshold {
    T slope = 0;
    T level = 0;
};

// Packed: -2c about the samples' origin; the accumulator of a centroid starts at |c|^2.
template <typename T> struct Centroids {
    const T *rows = nullptr; // (count, features) in the caller's coordinates
    std::size_t count = 0;
    std::size_t features = 0;
    std::vector<Tile> tiles;
    AlignedArray<T> values;
    AlignedArray<T> starts;
    AlignedArray<T> numbers;              // of the centroid of each column: lane_of()
    std::vector<Threshold<T>> thresholds; // of each group
    double most_slack = 1;                // a residual of this many thresholds is not rounding
    bool fits = true;                     // no distance overflows T
};

// What the kernels know of the samples.
template <typename T> struct SampleView {
    const T *rows = nullptr; // (count, features) in the caller's coordinates
    std::size_t count = 0;
    std::size_t features = 0;
    const double *weights = nullptr; // or null: all ones
    const T *panels = nullptr;       // [panel][features][lanes]
    const T *norms = nullptr;        // |x| about the origin, [panel][lanes]; null without checks
};

template <typename T> struct Pass {
    SampleView<T> samples;
    const Centroids<T> *centroids = nullptr;
    Mode mode = Mode::off;
    std::int32_t *labels = nullptr;
    Span<Fault> faults; // to put in, by row; empty in earnest
};

// A block of rows and features to sum up by label, in the order of the rows.
template <typename T> struct Summation {
    const SampleView<T> *samples;
    const std::int32_t *labels;
    std::size_t begin, end;       // rows
    std::size_t first, last;      // features
    double *sums;                 // [copies][clusters][stride], features from `first` on
    double *counts;               // [copies][clusters]
    std::size_t clusters, stride; // stride: a multiple of sum_lanes
    std::size_t copies; // row i adds to copy i % copies, a power of two: independent chains
};

constexpr std::size_t sum_lanes = 8;

// Columns of a tile: accumulators of two vectors each, and room for what they are made of. An even
// number, for the signs of the checksum.
constexpr int columns_with([[maybe_unused]] int registers) {
#ifdef LOWTIDE_KMEANS_COLUMNS // few compile fast, where the sanitizers make that slow
    return LOWTIDE_KMEANS_COLUMNS;
#else
    return registers * 3 / 8;
#endif
}

// One instruction set. All levels with a fused multiply-add give the same labels and sums.
template <typename T> struct Kernels {
    std::size_t lanes;   // samples in a panel
    std::size_t columns; // most columns of a tile
    // Labels of rows [begin, end), begin being a multiple of lanes.
    void (*assign)(const Pass<T> &, Variant, std::size_t begin, std::size_t end, Watch &);
    void (*sum)(const Summation<T> &);
    // Column sums of sums[clusters][stride].
    void (*total)(const double *sums, std::size_t clusters, std::size_t stride, double *totals);
    // Squared distance of a row to another, from the differences in float64.
    double (*distance)(const T *a, const T *b, std::size_t features);
    // A panel of `count` rows, in a frame. Returns the largest magnitude in it, NaN if an element
    // is not finite.
    T (*pack)(const T *rows, std::size_t count, std::size_t features, const T *origin, T scale,
              T *panel);
};

// The nearest centroid by squared distances from the differences in float64, which shares nothing
// with the accumulators: for samples whose accumulators cannot be trusted.
template <typename T>
std::int32_t nearest(const SampleView<T> &samples, const Centroids<T> &centroids,
                     double (*distance)(const T *, const T *, std::size_t), std::size_t row) {
    const std::size_t features = samples.features;
    std::int32_t label = 0;
    double least = HUGE_VAL;
    for (std::size_t k = 0; k < centroids.count; ++k) {
        const double square =
            distance(samples.rows + row * features, centroids.rows + k * features, features);
        if (square < least) {
            least = square;
            label = static_cast<std::int32_t>(k);
        }
    }
    return label;
}

template <typename T> const Kernels<T> *kernels_generic();
template <typename T> const Kernels<T> *kernels_avx2();   // null on another processor
template <typename T> const Kernels<T> *kernels_avx512(); // null on another processor

} // namespace lowtide::kmeans
