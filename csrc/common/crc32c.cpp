#include "crc32c.hpp"

#include <array>
#include <cstddef>
#include <stdexcept>

#include "cpu_features.hpp"
#include "crc_algebra.hpp"

#if LOWTIDE_X86
#include <nmmintrin.h>
#endif

namespace lowtide {
namespace {

using Algebra = CrcAlgebra<0x82F63B78u>;

#if LOWTIDE_X86

// Feeding a fixed number of zero bytes is linear in the state: one table per byte of the state.
struct Shift {
    std::array<Algebra::Table, 4> tables{};

    explicit constexpr Shift(std::size_t zero_bytes) {
        const std::uint32_t factor = Algebra::power(8 * zero_bytes);
        for (std::size_t position = 0; position < 4; ++position) {
            Algebra::Table &table = tables[position];
            for (std::size_t bit = 0; bit < 8; ++bit) { // entry 0 stays 0
                const std::size_t value = std::size_t{1} << bit;
                table[value] = Algebra::multiply(factor, std::uint32_t(value) << (8 * position));
                for (std::size_t rest = 1; rest < value; ++rest) {
                    table[value + rest] = table[value] ^ table[rest];
                }
            }
        }
    }

    std::uint32_t operator()(std::uint32_t state) const {
        return tables[0][byte_of(state, 0)] ^ tables[1][byte_of(state, 1)] ^
               tables[2][byte_of(state, 2)] ^ tables[3][byte_of(state, 3)];
    }
};

// The instruction takes one cycle to start and three to finish, so three independent lanes keep
// it busy. Long lanes make joining them cheap; short lanes serve what is left.
constexpr std::size_t long_lane = 4096;
constexpr std::size_t short_lane = 192;

LOWTIDE_TARGET("sse4.2")
inline std::uint64_t step(std::uint64_t state, const unsigned char *p) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof(word));
    return _mm_crc32_u64(state, word);
}

// Consumes as many groups of three lanes as fit and moves `p` behind them.
template <std::size_t Lane>
LOWTIDE_TARGET("sse4.2")
std::uint32_t three_lanes(std::uint32_t state, const unsigned char *&p, const unsigned char *end,
                          const Shift &shift) {
    static_assert(Lane % 8 == 0, "lanes hold whole words");
    while (static_cast<std::size_t>(end - p) >= 3 * Lane) {
        std::uint64_t a = state;
        std::uint64_t b = 0;
        std::uint64_t c = 0;
        for (std::size_t i = 0; i < Lane; i += 8) {
            a = step(a, p + i);
            b = step(b, p + Lane + i);
            c = step(c, p + 2 * Lane + i);
        }
        const std::uint32_t ab =
            shift(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
        state = shift(ab) ^ static_cast<std::uint32_t>(c);
        p += 3 * Lane;
    }
    return state;
}

LOWTIDE_TARGET("sse4.2")
std::uint32_t extend_sse42(std::uint32_t state, ConstBytes bytes) {
    static const Shift over_long(long_lane);
    static const Shift over_short(short_lane);
    const unsigned char *p = bytes.begin();
    const unsigned char *const end = bytes.end();
    state = three_lanes<long_lane>(state, p, end, over_long);
    state = three_lanes<short_lane>(state, p, end, over_short);
    std::uint64_t wide = state;
    for (; end - p >= 8; p += 8) {
        wide = step(wide, p);
    }
    state = static_cast<std::uint32_t>(wide);
    for (; p != end; ++p) {
        state = _mm_crc32_u8(state, *p);
    }
    return state;
}

#endif // LOWTIDE_X86

} // namespace

std::uint32_t crc32c_portable(ConstBytes bytes, std::uint32_t seed) {
    return ~Algebra::extend_portable(~seed, bytes);
}

std::uint32_t crc32c_sse42(ConstBytes bytes, std::uint32_t seed) {
#if LOWTIDE_X86
    if (cpu_features().sse42) {
        return ~extend_sse42(~seed, bytes);
    }
#endif
    (void)bytes;
    (void)seed;
    throw std::runtime_error("crc32c_sse42: this processor has no SSE4.2; use crc32c()");
}

std::uint32_t crc32c(ConstBytes bytes, std::uint32_t seed) {
#if LOWTIDE_X86
    if (cpu_features().sse42) {
        return ~extend_sse42(~seed, bytes);
    }
#endif
    return crc32c_portable(bytes, seed);
}

std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t length_b) {
    return Algebra::combine(crc_a, crc_b, length_b);
}

const char *crc32c_implementation() { return cpu_features().sse42 ? "sse4.2" : "portable"; }

} // namespace lowtide
