#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "contexts.hpp"
#include "entropy.hpp"
#include "rans.hpp"
#include "tables.hpp"

namespace lowtide::compression {
namespace {

template <typename T> void append(std::vector<unsigned char> &out, const T *values, std::size_t n) {
    const auto *bytes = reinterpret_cast<const unsigned char *>(values);
    out.insert(out.end(), bytes, bytes + n * sizeof(T));
}

// Bits into bytes, the lowest first.
class BitWriter {
  public:
    void put(std::uint32_t value, unsigned bits) {
        held_ |= std::uint64_t{value} << count_;
        count_ += bits;
        if (count_ >= 32) {
            const auto word = static_cast<std::uint32_t>(held_);
            append(bytes_, &word, 1);
            held_ >>= 32;
            count_ -= 32;
        }
    }

    const std::vector<unsigned char> &finish() {
        for (; count_ > 0; count_ = count_ > 8 ? count_ - 8 : 0) {
            bytes_.push_back(static_cast<unsigned char>(held_));
            held_ >>= 8;
        }
        return bytes_;
    }

  private:
    std::vector<unsigned char> bytes_;
    std::uint64_t held_ = 0;
    unsigned count_ = 0;
};

// A token, its lane and its full context (group * buckets + bucket) in one number: a write of
// bytes may change anything in the eyes of a compiler, a write of 16 bits may not.
using Symbol = std::uint16_t;

constexpr unsigned lane_bit = 7;
constexpr unsigned context_bit = 8;
static_assert(tokens == 1U << lane_bit, "a token takes the bits below its lane");

// The codes of a chunk in the order of the scan.
struct Scanned {
    std::vector<Symbol> symbols;
    std::vector<Counts> counts;
    BitWriter extra;
};

// Scans the codes of a chunk once.
class Scanner {
  public:
    Scanner(Span<const std::int32_t> codes, const Shape &shape)
        : codes_(codes), neighbours_(shape), counts_(std::size_t{groups} * buckets) {
        out_.symbols.resize(shape.count);
        next_ = out_.symbols.data();
    }

    Scanned run(const std::vector<Pass> &scan) {
        for (const Pass &pass : scan) {
            first_context_ = static_cast<unsigned>(pass.group) * buckets;
            neighbours_.for_each_pair(pass, [&](const std::array<Row, 2> &rows,
                                                std::size_t shared) { scan_rows(rows, shared); });
        }
        out_.counts.assign(counts_.size(), Counts{});
        for (std::size_t context = 0; context < counts_.size(); ++context) {
            std::copy(counts_[context].begin(), counts_[context].end(),
                      out_.counts[context].begin());
        }
        return std::move(out_);
    }

  private:
    struct Lane {
        const std::uint16_t *activity;
        std::size_t at;
        std::size_t step;
        unsigned mark; // what the lane adds to a symbol
        unsigned left;
    };

    void scan_rows(const std::array<Row, 2> &rows, std::size_t shared) {
        const std::int32_t *const codes = codes_.data();
        const std::uint8_t *const bucket = bucket_table().data();
        std::uint16_t *const magnitudes = neighbours_.magnitudes();
        std::array<std::uint32_t, tokens> *const counts = counts_.data() + first_context_;
        Symbol *next = next_;
        const auto scan_point = [&](Lane &lane, std::size_t i) {
            const std::uint32_t u = zigzag(codes[lane.at]);
            const Token token = token_of(u);
            const unsigned context = bucket[lane.activity[i] + 2 * lane.left];
            *next++ = static_cast<Symbol>((first_context_ + context) << context_bit | lane.mark |
                                          token.token);
            ++counts[context][token.token];
            if (token.extra_bits != 0) {
                out_.extra.put(u & ((1U << token.extra_bits) - 1), token.extra_bits);
            }
            lane.left = magnitudes[lane.at] = magnitude_of(u);
            lane.at += lane.step;
        };
        Lane a{neighbours_.activity(0), rows[0].base, rows[0].step, 0, 0};
        Lane b{neighbours_.activity(1), rows[1].base, rows[1].step, 1U << lane_bit, 0};
        for (std::size_t i = 0; i < shared; ++i) {
            scan_point(a, i);
            scan_point(b, i);
        }
        for (std::size_t i = shared; i < rows[0].count; ++i) {
            scan_point(a, i);
        }
        next_ = next;
    }

    Span<const std::int32_t> codes_;
    Neighbours neighbours_;
    std::vector<std::array<std::uint32_t, tokens>> counts_;
    unsigned first_context_ = 0;
    Symbol *next_ = nullptr;
    Scanned out_;
};

// A frequency as its encoder needs it: division by multiplication, exact for every 32-bit state.
struct Divisor {
    std::uint64_t inverse = 0; // floor(2^60 / frequency) + 1
    std::uint32_t frequency = 0;
    std::uint32_t begin = 0;

    std::uint32_t next_state(std::uint32_t x) const {
        __extension__ using Wide = unsigned __int128;
        const auto quotient = static_cast<std::uint32_t>((Wide{x} * inverse) >> 60);
        return (quotient << precision_bits) + (x - quotient * frequency) + begin;
    }
};
using Divisors = std::array<Divisor, tokens>;

Divisors divisors_of(const Frequencies &frequencies) {
    const Slices slices = slices_of(frequencies);
    Divisors divisors{};
    for (unsigned token = 0; token < tokens; ++token) {
        if (const std::uint32_t frequency = slices[token].frequency; frequency != 0) {
            divisors[token] = {(std::uint64_t{1} << 60) / frequency + 1, frequency,
                               slices[token].begin};
        }
    }
    return divisors;
}

// Words in the order in which the decoder reads them.
struct Words {
    std::vector<std::uint16_t> all; // filled from the end
    std::size_t first;
    std::array<std::uint32_t, 2> states{least_state, least_state};
};

Words encode_tokens(const Scanned &scanned, const Merging &merging,
                    const std::vector<Divisors> &divisors) {
    std::array<const Divisor *, std::size_t{groups} * buckets> divisors_of_context{};
    for (unsigned group = 0; group < groups; ++group) {
        for (unsigned bucket = 0; bucket < buckets; ++bucket) {
            divisors_of_context[group * buckets + bucket] =
                divisors[merging.context(group, bucket)].data();
        }
    }
    const std::size_t count = scanned.symbols.size();
    // One more than there can be: each symbol writes a word, and few keep it. A branch would be
    // mispredicted every third time.
    Words words{std::vector<std::uint16_t>(count + 1), count + 1, {least_state, least_state}};
    std::uint16_t *first = words.all.data() + words.first;
    const auto encode = [&](std::uint32_t &state, unsigned symbol) {
        const Divisor &divisor = divisors_of_context[symbol >> context_bit][symbol & (tokens - 1)];
        const bool is_full = state >= std::uint64_t{divisor.frequency} << 20;
        first[-1] = static_cast<std::uint16_t>(state);
        first -= static_cast<int>(is_full);
        state = divisor.next_state(is_full ? state >> 16 : state);
    };
    std::uint32_t a = least_state, b = least_state; // not an array: they stay in registers
    for (std::size_t i = count; i-- > 0;) {
        const unsigned symbol = scanned.symbols[i];
        if ((symbol >> lane_bit & 1U) != 0) {
            encode(b, symbol);
        } else {
            encode(a, symbol);
        }
    }
    words.states = {a, b};
    words.first = static_cast<std::size_t>(first - words.all.data());
    return words;
}

} // namespace

std::vector<unsigned char> entropy_encode(Span<const std::int32_t> codes, const Shape &shape,
                                          const std::vector<Pass> &scan) {
    Scanned scanned = Scanner(codes, shape).run(scan);
    const Merging merging = best_merging(scanned.counts, scan[0].level > 0);
    std::vector<Frequencies> tables;
    std::vector<Divisors> divisors;
    for (const Counts &counts : merged(scanned.counts, merging)) {
        tables.push_back(normalised(counts));
        divisors.push_back(divisors_of(tables.back()));
    }
    const Words words = encode_tokens(scanned, merging, divisors);
    std::vector<unsigned char> out;
    write_tables(merging, tables, out);
    const std::size_t count = words.all.size() - words.first;
    const std::array<std::uint32_t, 3> head = {static_cast<std::uint32_t>(count), words.states[0],
                                               words.states[1]};
    append(out, head.data(), head.size());
    append(out, words.all.data() + words.first, count);
    const std::vector<unsigned char> &extra = scanned.extra.finish();
    append(out, extra.data(), extra.size());
    return out;
}

double cost_bits(Span<const std::int32_t> codes) {
    Counts counts{};
    double bits = 0.0;
    for (const std::int32_t code : codes) {
        const Token token = token_of(zigzag(code));
        ++counts[token.token];
        bits += token.extra_bits;
    }
    const auto total = static_cast<double>(codes.size());
    for (const std::uint64_t count : counts) {
        if (count != 0) {
            bits += static_cast<double>(count) * std::log2(total / static_cast<double>(count));
        }
    }
    return bits;
}

} // namespace lowtide::compression
