// What encoder and decoder of rANS share. Format: FORMAT.md, section 5.
#pragma once

#include <array>
#include <cstdint>

#include "contexts.hpp"
#include "tables.hpp"

namespace lowtide::compression {

constexpr std::uint32_t least_state = 1U << 16;

struct Slice {
    std::uint16_t frequency;
    std::uint16_t begin;
};
constexpr unsigned no_token = tokens; // all that a context without a table gives
using Slices = std::array<Slice, tokens + 1>;

inline Slices slices_of(const Frequencies &frequencies) {
    Slices slices{};
    std::uint32_t begin = 0;
    for (unsigned token = 0; token < tokens; ++token) {
        slices[token] = {frequencies[token], static_cast<std::uint16_t>(begin)};
        begin += frequencies[token];
    }
    return slices;
}

} // namespace lowtide::compression
