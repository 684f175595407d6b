// Samples made ready once for many passes.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "pass.hpp"

namespace lowtide::kmeans {

// Rows are worked on in ranges that depend on their number alone, so that results do not depend on
// the number of threads. A range is a whole number of panels of any level, except for the last.
struct Ranges {
    std::size_t count; // of ranges
    std::size_t rows;  // in each but the last
    std::size_t total; // rows

    std::size_t begin(std::size_t range) const { return std::min(total, range * rows); }
    std::size_t end(std::size_t range) const { return begin(range + 1); }
};

Ranges ranges_of(std::size_t rows);

// What the sums of any pass must add up to in each range of rows, and how large the terms were.
struct RangeSums {
    std::vector<double> sums;       // [range][features], weighted
    std::vector<double> magnitudes; // of their terms
    std::vector<double> weights;    // [range]
};

// Where the samples' panels stand: x' = (x - origin) * scale. The origin is near the mean, because
// rounding errors grow with |x'| |c'|; its elements are multiples of a power of two near the
// samples' spread, so that numbers on a grid (integers, pixels) stay exact and their ties ties.
// The scale is a power of two that brings the spread to about 1.
template <typename T> struct Frame {
    std::vector<T> origin;
    T scale = 1;
};

template <typename T> class Samples {
  public:
    // The rows and weights (null: all ones) must outlive this. Throws std::domain_error if an
    // element is not finite.
    Samples(Span<const T> rows, std::size_t count, std::size_t features, const double *weights,
            Level level, unsigned threads);

    const SampleView<T> &view() const { return view_; }
    const Kernels<T> &kernels() const { return *kernels_; }
    const Ranges &ranges() const { return ranges_; }
    const Frame<T> &frame() const { return frame_; }
    T largest() const { return largest_; } // magnitude of an element of a panel

    // What checks need, made at the first call: norms in view(), and the ranges' sums. Also packs
    // the panels again and puts right what differs; returns how many panels did.
    std::size_t encode(unsigned threads);
    const RangeSums &range_sums() const { return sums_; }

    // Weighted sum of squared distances to the origin, in the caller's coordinates.
    double square(unsigned threads);

  private:
    T pack_all(unsigned threads);
    T pack(std::size_t row, T *panel) const; // returns the largest magnitude, NaN if there is one
    void add_up(std::size_t range);

    SampleView<T> view_;
    const Kernels<T> *kernels_;
    Ranges ranges_;
    Frame<T> frame_;
    AlignedArray<T> panels_;
    AlignedArray<T> norms_;
    RangeSums sums_;
    T largest_ = 0;
    std::mutex mutex_; // guards what is made at the first call
    double square_ = -1;
};

// Null if this processor cannot run it.
template <typename T> const Kernels<T> *kernels_of(Level level) {
    return level == Level::avx512 ? kernels_avx512<T>()
           : level == Level::avx2 ? kernels_avx2<T>()
                                  : kernels_generic<T>();
}

} // namespace lowtide::kmeans
