// Frequencies of tokens: counted, normalised, written and read. Format: FORMAT.md, section 5.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/span.hpp"
#include "contexts.hpp"

namespace lowtide::compression {

constexpr unsigned precision_bits = 12;
constexpr std::uint32_t total_frequency = 1U << precision_bits;

using Counts = std::array<std::uint64_t, tokens>;
using Frequencies = std::array<std::uint16_t, tokens>;

// Frequencies that add up to total_frequency; all 0 if nothing was counted.
Frequencies normalised(const Counts &counts);

// The cheapest way to merge the contexts, and the counts of the merged ones. `full` has
// groups * buckets contexts, in the order of Merging{0, true}.
Merging best_merging(const std::vector<Counts> &full, bool may_keep_groups);
std::vector<Counts> merged(const std::vector<Counts> &full, const Merging &merging);

void write_tables(const Merging &merging, const std::vector<Frequencies> &tables,
                  std::vector<unsigned char> &out);

// Reads what write_tables wrote and advances `offset`; throws std::invalid_argument.
Merging read_tables(ConstBytes section, std::size_t &offset, std::vector<Frequencies> &tables);

} // namespace lowtide::compression
