#include "crc32c.hpp"

#include <array>
#include <cstddef>
#include <stdexcept>

#include "cpu_features.hpp"

#if LOWTIDE_X86
#include <nmmintrin.h>
#endif

// Throughout, a 32-bit value stands for a polynomial over GF(2) of degree < 32 with its bits
// reflected: the highest bit is the coefficient of x^0. A "state" is the register without the
// initial and final inversion; on states, the checksum is linear.
namespace lowtide {
namespace {

constexpr std::uint32_t polynomial = 0x82F63B78u;
constexpr std::uint32_t one = 0x80000000u; // x^0

constexpr std::uint32_t times_x(std::uint32_t a) { return (a >> 1) ^ ((a & 1u) * polynomial); }

// a * b modulo the polynomial.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (int bit = 31; bit >= 0; --bit) {
        product ^= ((a >> bit) & 1u) * b;
        b = times_x(b);
    }
    return product;
}

// x^(8 * bytes): multiplying a state by it has the effect of feeding that many zero bytes.
constexpr std::uint32_t power_of_bytes(std::uint64_t bytes) {
    std::uint32_t result = one;
    std::uint32_t square = one >> 8; // x^8
    for (; bytes != 0; bytes >>= 1) {
        if ((bytes & 1u) != 0) {
            result = multiply(result, square);
        }
        square = multiply(square, square);
    }
    return result;
}

using Table = std::array<std::uint32_t, 256>;

// slices[k][v]: state after byte v and then k zero bytes.
constexpr std::array<Table, 8> make_slices() {
    std::array<Table, 8> slices{};
    for (std::uint32_t value = 0; value < 256; ++value) {
        std::uint32_t state = value;
        for (int bit = 0; bit < 8; ++bit) {
            state = times_x(state);
        }
        slices[0][value] = state;
    }
    for (std::size_t k = 1; k < slices.size(); ++k) {
        for (std::size_t value = 0; value < 256; ++value) {
            const std::uint32_t before = slices[k - 1][value];
            slices[k][value] = (before >> 8) ^ slices[0][before & 0xFFu];
        }
    }
    return slices;
}

constexpr std::array<Table, 8> slices = make_slices();

inline std::uint32_t byte_of(std::uint32_t word, int index) {
    return (word >> (8 * index)) & 0xFFu;
}

inline std::uint32_t little_endian_32(const unsigned char *p) {
    return std::uint32_t{p[0]} | std::uint32_t{p[1]} << 8 | std::uint32_t{p[2]} << 16 |
           std::uint32_t{p[3]} << 24;
}

std::uint32_t extend_portable(std::uint32_t state, ConstBytes bytes) {
    const unsigned char *p = bytes.begin();
    const unsigned char *const end = bytes.end();
    for (; end - p >= 8; p += 8) {
        const std::uint32_t low = little_endian_32(p) ^ state;
        const std::uint32_t high = little_endian_32(p + 4);
        state = slices[7][byte_of(low, 0)] ^ slices[6][byte_of(low, 1)] ^
                slices[5][byte_of(low, 2)] ^ slices[4][byte_of(low, 3)] ^
                slices[3][byte_of(high, 0)] ^ slices[2][byte_of(high, 1)] ^
                slices[1][byte_of(high, 2)] ^ slices[0][byte_of(high, 3)];
    }
    for (; p != end; ++p) {
        state = (state >> 8) ^ slices[0][(state ^ *p) & 0xFFu];
    }
    return state;
}

#if LOWTIDE_X86

// Feeding a fixed number of zero bytes is linear in the state: one table per byte of the state.
struct Shift {
    std::array<Table, 4> tables{};

    explicit constexpr Shift(std::size_t zero_bytes) {
        const std::uint32_t factor = power_of_bytes(zero_bytes);
        for (std::size_t position = 0; position < 4; ++position) {
            Table &table = tables[position];
            for (std::size_t bit = 0; bit < 8; ++bit) { // entry 0 stays 0
                const std::size_t value = std::size_t{1} << bit;
                table[value] = multiply(factor, std::uint32_t(value) << (8 * position));
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
    return ~extend_portable(~seed, bytes);
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
    // The inversions cancel: A's state, pushed through B's zero bytes, adds to B's own checksum.
    return multiply(power_of_bytes(length_b), crc_a) ^ crc_b;
}

const char *crc32c_implementation() { return cpu_features().sse42 ? "sse4.2" : "portable"; }

} // namespace lowtide
