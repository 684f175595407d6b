#include "tables.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace lowtide::compression {
namespace {

constexpr unsigned context_cost_bits = 8; // of a table's length ...
constexpr unsigned token_cost_bits = 10;  // ... and of a frequency, about
constexpr std::array<unsigned, 4> shifts = {0, 1, 2, 5};

double cost(const std::vector<Counts> &contexts) {
    double bits = context_cost_bits * static_cast<double>(contexts.size());
    for (const Counts &counts : contexts) {
        const auto total =
            static_cast<double>(std::accumulate(counts.begin(), counts.end(), std::uint64_t{0}));
        for (const std::uint64_t count : counts) {
            if (count != 0) {
                const auto n = static_cast<double>(count);
                bits += n * std::log2(total / n) + token_cost_bits;
            }
        }
    }
    return bits;
}

unsigned char next(ConstBytes section, std::size_t &offset) {
    if (offset >= section.size()) {
        throw std::invalid_argument("codes: the tables of frequencies are cut off");
    }
    return section[offset++];
}

} // namespace

Frequencies normalised(const Counts &counts) {
    Frequencies frequencies{};
    const std::uint64_t total = std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
    if (total == 0) {
        return frequencies;
    }
    std::uint32_t sum = 0;
    for (unsigned token = 0; token < tokens; ++token) {
        if (counts[token] != 0) {
            const std::uint64_t share = counts[token] * total_frequency / total;
            frequencies[token] = static_cast<std::uint16_t>(std::max<std::uint64_t>(share, 1));
            sum += frequencies[token];
        }
    }
    if (sum < total_frequency) {
        const auto largest = std::max_element(counts.begin(), counts.end()) - counts.begin();
        frequencies[static_cast<std::size_t>(largest)] = static_cast<std::uint16_t>(
            frequencies[static_cast<std::size_t>(largest)] + (total_frequency - sum));
    }
    for (; sum > total_frequency; --sum) {
        --*std::max_element(frequencies.begin(), frequencies.end());
    }
    return frequencies;
}

std::vector<Counts> merged(const std::vector<Counts> &full, const Merging &merging) {
    std::vector<Counts> contexts(merging.contexts(), Counts{});
    for (unsigned group = 0; group < groups; ++group) {
        for (unsigned bucket = 0; bucket < buckets; ++bucket) {
            const Counts &from = full[group * buckets + bucket];
            Counts &to = contexts[merging.context(group, bucket)];
            for (unsigned token = 0; token < tokens; ++token) {
                to[token] += from[token];
            }
        }
    }
    return contexts;
}

Merging best_merging(const std::vector<Counts> &full, bool may_keep_groups) {
    Merging best;
    double least = std::numeric_limits<double>::infinity();
    for (const bool keeps_groups : {true, false}) {
        if (keeps_groups && !may_keep_groups) {
            continue;
        }
        for (const unsigned shift : shifts) {
            const Merging merging{shift, keeps_groups};
            const double bits = cost(merged(full, merging));
            if (bits < least) {
                least = bits;
                best = merging;
            }
        }
    }
    return best;
}

void write_tables(const Merging &merging, const std::vector<Frequencies> &tables,
                  std::vector<unsigned char> &out) {
    out.push_back(static_cast<unsigned char>(merging.shift | (merging.keeps_groups ? 8U : 0U)));
    for (const Frequencies &table : tables) {
        unsigned length = tokens;
        while (length > 0 && table[length - 1] == 0) {
            --length;
        }
        out.push_back(static_cast<unsigned char>(length));
        for (unsigned token = 0; token < length; ++token) {
            const unsigned frequency = table[token];
            if (frequency >= 128) {
                out.push_back(static_cast<unsigned char>(0x80U | (frequency & 127U)));
                out.push_back(static_cast<unsigned char>(frequency >> 7));
            } else {
                out.push_back(static_cast<unsigned char>(frequency));
            }
        }
    }
}

Merging read_tables(ConstBytes section, std::size_t &offset, std::vector<Frequencies> &tables) {
    const unsigned how = next(section, offset);
    const Merging merging{how & 7U, (how & 8U) != 0};
    if (how > 15 || std::find(shifts.begin(), shifts.end(), merging.shift) == shifts.end()) {
        throw std::invalid_argument("codes: got the way of merging " + std::to_string(how) +
                                    ", which no version knows");
    }
    tables.assign(merging.contexts(), Frequencies{});
    for (Frequencies &table : tables) {
        const unsigned length = next(section, offset);
        if (length > tokens) {
            throw std::invalid_argument("codes: a table has " + std::to_string(length) +
                                        " tokens, allowed are " + std::to_string(tokens));
        }
        std::uint32_t sum = 0;
        for (unsigned token = 0; token < length; ++token) {
            unsigned frequency = next(section, offset);
            if (frequency >= 128) {
                frequency = (frequency & 127U) | (unsigned{next(section, offset)} << 7);
                if (frequency < 128) {
                    throw std::invalid_argument("codes: a frequency is written too long");
                }
            }
            sum += frequency;
            if (sum > total_frequency) {
                break;
            }
            table[token] = static_cast<std::uint16_t>(frequency);
        }
        if (length != 0 && (sum != total_frequency || table[length - 1] == 0)) {
            throw std::invalid_argument(
                "codes: the frequencies of a table do not add up to 4096, or the last one is 0");
        }
    }
    return merging;
}

} // namespace lowtide::compression
