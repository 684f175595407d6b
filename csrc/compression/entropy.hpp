// Entropy coding of a chunk's codes: rANS in contexts. Format: FORMAT.md, section 5.
#pragma once

#include <cstdint>
#include <vector>

#include "common/span.hpp"
#include "scan.hpp"

namespace lowtide::compression {

// `codes`: shape.count codes; `scan` as from scan_of_... for the same shape.
std::vector<unsigned char> entropy_encode(Span<const std::int32_t> codes, const Shape &shape,
                                          const std::vector<Pass> &scan);

// Throws std::invalid_argument where the section is damaged.
void entropy_decode(ConstBytes section, const Shape &shape, const std::vector<Pass> &scan,
                    Span<std::int32_t> codes);

// Entropy of the tokens without contexts, and all extra bits, in bits.
double cost_bits(Span<const std::int32_t> codes);

} // namespace lowtide::compression
