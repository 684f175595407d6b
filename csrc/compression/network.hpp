// Small networks that give the same bits on every processor: float32, no fused operations, and one
// order of additions for each number that comes out. Format: FORMAT.md, section 8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/span.hpp"

namespace lowtide::compression {

enum class LayerKind {
    affine,   // a weighted sum over the sources of each position
    divide,   // by the root of a weighted sum of squares over the channels
    multiply, // with that root
};

// `weights` has a matrix (channels in, channels out) for each tap. A position of the output sums
// over its sources (offsets[position] to offsets[position + 1] - 1): positions of the input, each
// with the tap it is seen through. Other kinds have one matrix and no sources.
struct Layer {
    LayerKind kind = LayerKind::affine;
    Span<const float> weights;
    Span<const float> bias; // one for each channel of the output
    std::size_t channels_in = 0;
    Span<const std::int32_t> offsets;
    Span<const std::int32_t> sources;
    Span<const std::int32_t> taps;
};

// Instruction sets that network_run() can use here, slowest first.
std::vector<std::string> network_levels();

// Runs `layers` on `count` samples with up to `threads` threads. A sample's numbers are those of
// its first position, channel by channel, then those of the next. All levels give the same bits,
// but for which NaN a NaN is. Throws std::invalid_argument where something does not fit.
void network_run(const std::vector<Layer> &layers, std::size_t count, Span<const float> from,
                 Span<float> to, unsigned threads, const std::string &level);

} // namespace lowtide::compression
