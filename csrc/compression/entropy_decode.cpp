#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "contexts.hpp"
#include "entropy.hpp"
#include "rans.hpp"
#include "tables.hpp"

namespace lowtide::compression {
namespace {

constexpr std::uint32_t slot_mask = total_frequency - 1;

class BitReader {
  public:
    explicit BitReader(ConstBytes bytes) : bytes_(bytes) {}

    std::uint32_t get(unsigned bits) { // at most 29
        if (count_ < bits) {
            refill();
            if (count_ < bits) {
                throw std::invalid_argument("codes: the extra bits are cut off");
            }
        }
        const auto value = static_cast<std::uint32_t>(held_ & ((std::uint64_t{1} << bits) - 1));
        held_ >>= bits;
        count_ -= bits;
        return value;
    }

    // Everything was read but the padding of the last byte, which is 0.
    bool is_at_end() const { return next_ == bytes_.size() && count_ < 8 && held_ == 0; }

  private:
    void refill() {
        while (count_ <= 56 && next_ < bytes_.size()) {
            held_ |= std::uint64_t{bytes_[next_++]} << count_;
            count_ += 8;
        }
    }

    ConstBytes bytes_;
    std::size_t next_ = 0;
    std::uint64_t held_ = 0;
    unsigned count_ = 0;
};

// What a decoder looks tokens up in. A context that never occurs gives no_token, which stands with
// the tokens that have extra bits, so that the common ones need no check.
struct Lookup {
    std::vector<Slices> slices;
    std::vector<std::array<std::uint8_t, total_frequency>> token_of_slot;
    // Context by group and activity: one step where bucket and merging would be two.
    std::vector<std::array<std::uint8_t, largest_activity + 1>> context_of;

    Lookup(const Merging &merging, const std::vector<Frequencies> &tables,
           const std::vector<Pass> &scan)
        : token_of_slot(tables.size()), context_of(groups) {
        for (std::size_t context = 0; context < tables.size(); ++context) {
            slices.push_back(slices_of(tables[context]));
            token_of_slot[context].fill(no_token);
            std::uint8_t *slot = token_of_slot[context].data();
            for (unsigned token = 0; token < tokens; ++token) {
                slot = std::fill_n(slot, tables[context][token], static_cast<std::uint8_t>(token));
            }
        }
        std::array<bool, groups> is_made{};
        for (const Pass &pass : scan) {
            const auto group = static_cast<unsigned>(pass.group);
            if (!is_made[group]) {
                std::transform(bucket_table().begin(), bucket_table().end(),
                               context_of[group].begin(), [&](std::uint8_t bucket) {
                                   return static_cast<std::uint8_t>(merging.context(group, bucket));
                               });
                is_made[group] = true;
            }
        }
    }
};

// The 16-bit words of a section. Each symbol looks at the next one and few take it; a branch would
// be mispredicted every third time.
class WordReader {
  public:
    explicit WordReader(Span<const std::uint16_t> words) // the last one is not to be taken
        : at_(words.begin()), end_(words.end() - 1) {}

    std::uint32_t refilled(std::uint32_t state) {
        const bool is_low = state < least_state;
        const std::uint32_t filled = (state << 16) | *at_;
        at_ += static_cast<int>(is_low);
        if (at_ > end_) {
            throw std::invalid_argument("codes: there are too few words");
        }
        return is_low ? filled : state;
    }

    bool is_at_end() const { return at_ == end_; }

  private:
    const std::uint16_t *at_;
    const std::uint16_t *end_;
};

// Decodes a section's codes; the two lanes of a pass take turns.
class Decoder {
  public:
    Decoder(const Shape &shape, const Lookup &lookup, Span<std::int32_t> codes)
        : lookup_(lookup), codes_(codes.data()), neighbours_(shape),
          magnitudes_(neighbours_.magnitudes()) {}

    void decode_pass(const Pass &pass, WordReader &words, BitReader &extra,
                     std::array<std::uint32_t, 2> &states) {
        context_of_ = lookup_.context_of[static_cast<std::size_t>(pass.group)].data();
        neighbours_.for_each_pair(pass, [&](const std::array<Row, 2> &rows, std::size_t shared) {
            decode_rows(rows, shared, words, extra, states);
        });
    }

  private:
    // Point i of a row in its lane: what the next one needs is in registers.
    struct Lane {
        const std::uint16_t *activity;
        std::size_t at;
        std::size_t step;
        std::uint32_t state;
        unsigned left;
    };

    void decode_rows(const std::array<Row, 2> &rows, std::size_t shared, WordReader &all_words,
                     BitReader &extra, std::array<std::uint32_t, 2> &states) {
        WordReader words = all_words;
        Lane a{neighbours_.activity(0), rows[0].base, rows[0].step, states[0], 0};
        Lane b{neighbours_.activity(1), rows[1].base, rows[1].step, states[1], 0};
        for (std::size_t i = 0; i < shared; ++i) {
            decode_point(a, i, words, extra);
            decode_point(b, i, words, extra);
        }
        for (std::size_t i = shared; i < rows[0].count; ++i) {
            decode_point(a, i, words, extra);
        }
        states = {a.state, b.state};
        all_words = words;
    }

    void decode_point(Lane &lane, std::size_t i, WordReader &words, BitReader &extra) {
        const unsigned context = context_of_[lane.activity[i] + 2 * lane.left];
        const std::uint32_t slot = lane.state & slot_mask;
        const unsigned token = lookup_.token_of_slot[context][slot];
        const Slice slice = lookup_.slices[context][token];
        lane.state =
            words.refilled(slice.frequency * (lane.state >> precision_bits) + slot - slice.begin);
        std::uint32_t u = token;
        if (token >= direct_tokens) {
            if (token == no_token) {
                throw std::invalid_argument("codes: a context occurs that has no table");
            }
            u = number_of(token, extra.get(extra_bits_of(token)));
        }
        codes_[lane.at] = unzigzag(u);
        magnitudes_[lane.at] = magnitude_of(u);
        lane.left = magnitude_of(u);
        lane.at += lane.step;
    }

    const Lookup &lookup_;
    const std::uint8_t *context_of_ = nullptr;
    std::int32_t *codes_;
    Neighbours neighbours_;
    std::uint16_t *magnitudes_; // those of `neighbours_`
};

} // namespace

void entropy_decode(ConstBytes section, const Shape &shape, const std::vector<Pass> &scan,
                    Span<std::int32_t> codes) {
    std::size_t offset = 0;
    std::vector<Frequencies> tables;
    const Merging merging = read_tables(section, offset, tables);
    const Lookup lookup(merging, tables, scan);
    if (section.size() - offset < 12) {
        throw std::invalid_argument("codes: the section is cut off before its words");
    }
    const std::size_t word_count = load<std::uint32_t>(section, offset);
    std::array<std::uint32_t, 2> states = {load<std::uint32_t>(section, offset + 4),
                                           load<std::uint32_t>(section, offset + 8)};
    offset += 12;
    if (states[0] < least_state || states[1] < least_state) {
        throw std::invalid_argument("codes: a state is below what every encoder leaves");
    }
    if (word_count > (section.size() - offset) / 2) {
        throw std::invalid_argument("codes: " + std::to_string(word_count) +
                                    " words are claimed, the section is shorter");
    }
    std::vector<std::uint16_t> all_words(word_count + 1, 0); // with one that is never taken
    std::memcpy(all_words.data(), section.subspan(offset, 2 * word_count).data(), 2 * word_count);
    WordReader words(Span<const std::uint16_t>(all_words.data(), all_words.size()));
    BitReader extra(section.drop(offset + 2 * word_count));
    Decoder decoder(shape, lookup, codes);
    for (const Pass &pass : scan) {
        decoder.decode_pass(pass, words, extra, states);
    }
    if (!words.is_at_end() || states[0] != least_state || states[1] != least_state ||
        !extra.is_at_end()) {
        throw std::invalid_argument("codes: the section does not end where its codes end");
    }
}

} // namespace lowtide::compression
