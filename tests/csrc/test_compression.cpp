// The coders of csrc/compression under the sanitizers: round trips over shapes and kinds of data,
// and thousands of damaged sections, which must be refused or decoded, without touching memory
// that is not theirs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "compression/entropy.hpp"
#include "compression/predict.hpp"
#include "compression/verify.hpp"

using namespace lowtide::compression;
using lowtide::ConstBytes;
using lowtide::Span;

namespace {

std::mt19937 chance(7);

void require(bool holds, const std::string &what) {
    if (!holds) {
        std::fprintf(stderr, "failed: %s\n", what.c_str());
        std::exit(1);
    }
}

template <typename T> std::vector<T> field(std::size_t count, int kind) {
    std::normal_distribution<double> normal;
    std::vector<T> values(count);
    double walk = 0.0;
    for (T &value : values) {
        walk += normal(chance);
        value = static_cast<T>(kind == 0   ? walk
                               : kind == 1 ? normal(chance) * 1e30
                               : kind == 2 ? 0.0
                                           : std::ldexp(normal(chance), chance() % 200 - 100));
    }
    if (kind == 3) {
        values[count / 2] = std::numeric_limits<T>::max();
        values[count / 3] = -std::numeric_limits<T>::max();
        values[count / 4] = std::numeric_limits<T>::denorm_min();
    }
    return values;
}

template <typename T>
void damage(const std::vector<unsigned char> &section, const Shape &shape,
            const std::vector<Pass> &scan, int turns) {
    std::vector<std::int32_t> codes(shape.count);
    for (int turn = 0; turn < turns; ++turn) {
        std::vector<unsigned char> changed = section;
        const auto edits = 1 + chance() % 4;
        for (unsigned edit = 0; edit < edits && !changed.empty(); ++edit) {
            changed[chance() % changed.size()] = static_cast<unsigned char>(chance());
        }
        if (turn % 3 == 0) {
            changed.resize(chance() % (changed.size() + 9));
        }
        try {
            entropy_decode(ConstBytes(changed.data(), changed.size()), shape, scan,
                           Span<std::int32_t>(codes.data(), codes.size()));
        } catch (const std::invalid_argument &) {
            continue; // refused, as it should be
        }
        std::vector<T> restored(shape.count);
        interpolation_decode<T>(
            Span<const std::int32_t>(codes.data(), codes.size()), shape,
            {std::vector<int>(static_cast<std::size_t>(shape.axes), 1), true, 0, 0}, 1e300,
            Span<T>(restored.data(), restored.size()));
        difference_decode<T>(Span<std::int32_t>(codes.data(), codes.size()), shape,
                             std::vector<int>(static_cast<std::size_t>(shape.axes), 2), 1e-300,
                             Span<T>(restored.data(), restored.size()));
    }
}

template <typename T> void round_trip(const std::vector<std::size_t> &lengths, int kind) {
    const Shape shape(lengths);
    const std::vector<T> values = field<T>(shape.count, kind);
    const Span<const T> work(values.data(), values.size());
    std::vector<std::int32_t> codes(shape.count), decoded(shape.count);
    std::vector<T> restored(shape.count), again(shape.count);
    const Span<std::int32_t> to(codes.data(), codes.size());
    const Span<const std::int32_t> from(codes.data(), codes.size());
    const Span<std::int32_t> back(decoded.data(), decoded.size());
    const double step = kind == 1 ? 1e29 : 1e-2;

    const std::vector<int> orders(lengths.size(), 1 + static_cast<int>(chance() % 2));
    difference_encode<T>(work, shape, orders, step, to, Span<T>(restored.data(), shape.count));
    std::vector<Pass> scan = scan_of_differences(shape);
    std::vector<unsigned char> section = entropy_encode(from, shape, scan);
    entropy_decode(ConstBytes(section.data(), section.size()), shape, scan, back);
    require(codes == decoded, "the codes of differences come back");
    difference_decode<T>(back, shape, orders, step, Span<T>(again.data(), shape.count));
    require(restored == again, "differences: the decoder restores what the encoder saw");
    damage<T>(section, shape, scan, 40);

    std::vector<int> weights(lengths.size());
    for (int &weight : weights) {
        weight = static_cast<int>(chance() % 4);
    }
    const Interpolation how{weights, chance() % 2 == 0, 4, 8};
    interpolation_encode<T>(work, shape, how, step, to, Span<T>(restored.data(), shape.count));
    scan = scan_of_interpolation(shape, weights);
    section = entropy_encode(from, shape, scan);
    entropy_decode(ConstBytes(section.data(), section.size()), shape, scan, back);
    require(codes == decoded, "the codes of interpolation come back");
    interpolation_decode<T>(from, shape, how, step, Span<T>(again.data(), shape.count));
    require(restored == again, "interpolation: the decoder restores what the encoder saw");
    damage<T>(section, shape, scan, 40);
    outside<T>(work, Span<const T>(restored.data(), shape.count), step / 2, kind % 2 == 0);
}

// A table that claims more tokens than there are.
void refuse_long_table() {
    const Shape shape({4});
    std::vector<unsigned char> section(300, 0);
    section[0] = 5; // one context
    section[1] = 250;
    std::vector<std::int32_t> codes(4);
    try {
        entropy_decode(ConstBytes(section.data(), section.size()), shape,
                       scan_of_differences(shape), Span<std::int32_t>(codes.data(), 4));
    } catch (const std::invalid_argument &) {
        return;
    }
    require(false, "a table of 250 tokens is refused");
}

} // namespace

int main() {
    refuse_long_table();
    const std::vector<std::vector<std::size_t>> shapes = {
        {1},       {2},       {3},          {1000},       {1, 1},       {7, 9},        {64, 33},
        {2, 1, 5}, {9, 8, 7}, {17, 16, 15}, {1, 2, 3, 4}, {5, 4, 3, 6}, {2, 2, 2, 129}};
    for (const auto &lengths : shapes) {
        for (int kind = 0; kind < 4; ++kind) {
            round_trip<float>(lengths, kind);
            round_trip<double>(lengths, kind);
        }
    }
    std::puts("ok");
}
