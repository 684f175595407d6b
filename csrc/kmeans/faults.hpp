// How a pass answers to silent errors, what it counts, and errors that tests put in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lowtide::kmeans {

enum class Mode { off, detect, correct, recompute };

// Of a kernel. `plain` computes no checksum; `injected` is `checked` with faults put in, for tests.
enum class Variant { plain, checked, injected };

struct Counts {
    std::uint64_t checks = 0;
    std::uint64_t detected = 0;
    std::uint64_t corrected = 0;
    std::uint64_t recomputed = 0;
    std::uint64_t uncorrected = 0;
    double max_residual = 0; // in thresholds

    void add(const Counts &other) {
        checks += other.checks;
        detected += other.detected;
        corrected += other.corrected;
        recomputed += other.recomputed;
        uncorrected += other.uncorrected;
        max_residual = std::max(max_residual, other.max_residual);
    }
};

// What the checks of one range of rows have seen so far.
struct Watch {
    Counts counts;
    double seen = 1.0 / 16; // largest residual, in thresholds, from where it matters
    double limit = 1;       // residuals above it are looked into
    std::uint64_t rows = 0;
    std::uint64_t rounded = 0; // residuals above the limit that were rounding

    // Note a residual without an error. Samples whose rounding errors go beyond the threshold as a
    // rule, because all features are alike, say, raise the limit, or looking into each would take
    // longer than the pass.
    void held(double residual, bool is_within, double most) {
        counts.max_residual = std::max(counts.max_residual, residual);
        rounded += is_within ? 0 : 1;
        if (rounded > 8 + rows / 64) {
            rounded = 0;
            limit = std::min(most, std::max(limit, residual) * 1.5);
        }
        seen = std::max(seen, std::min(residual, limit));
    }
};

// What one bit is flipped of.
//   acc:      accumulator of centroid `column` and sample `row`
//   checksum: accumulator of the checksum of group `column` and sample `row`
//   best, best_again, index: running minimum of sample `row`, after `column`
//   sum:      sum of feature `column` in the cluster of sample `row`, after that sample
//   count:    weight of that cluster
//   norm:     |c|^2 of centroid `column` when it is encoded
enum class Site { acc, checksum, best, best_again, index, sum, count, norm };

struct Fault {
    Site site = Site::acc;
    std::size_t row = 0;
    std::size_t column = 0;
    unsigned bit = 0;
    bool happened = false;
    double before = 0;
    double after = 0;
};

template <typename T> void flip(T &value, Fault &fault) {
    unsigned char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    fault.before = static_cast<double>(value);
    // Byte order as on x86 and every other machine this runs on.
    const unsigned bit = fault.bit % (8 * sizeof(T));
    bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ (1u << (bit % 8)));
    std::memcpy(&value, bytes, sizeof(T));
    fault.after = static_cast<double>(value);
    fault.happened = true;
}

} // namespace lowtide::kmeans
