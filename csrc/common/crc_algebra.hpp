// What every reflected 32-bit CRC shares: arithmetic on its states, tables, joining of checksums.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "span.hpp"

// Throughout, a 32-bit value stands for a polynomial over GF(2) of degree < 32 with its bits
// reflected: the highest bit is the coefficient of x^0. A "state" is the register without the
// initial and final inversion; on states, the checksum is linear.
namespace lowtide {

inline std::uint32_t byte_of(std::uint32_t word, int index) {
    return (word >> (8 * index)) & 0xFFu;
}

inline std::uint32_t little_endian_32(const unsigned char *p) {
    return std::uint32_t{p[0]} | std::uint32_t{p[1]} << 8 | std::uint32_t{p[2]} << 16 |
           std::uint32_t{p[3]} << 24;
}

template <std::uint32_t Polynomial> class CrcAlgebra {
  public:
    using Table = std::array<std::uint32_t, 256>;

    static constexpr std::uint32_t one = 0x80000000u; // x^0

    static constexpr std::uint32_t times_x(std::uint32_t a) {
        return (a >> 1) ^ ((a & 1u) * Polynomial);
    }

    // a * b modulo the polynomial.
    static constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
        std::uint32_t product = 0;
        for (int bit = 31; bit >= 0; --bit) {
            product ^= ((a >> bit) & 1u) * b;
            b = times_x(b);
        }
        return product;
    }

    // x^exponent.
    static constexpr std::uint32_t power(std::uint64_t exponent) {
        std::uint32_t result = one;
        std::uint32_t square = one >> 1; // x^1
        for (; exponent != 0; exponent >>= 1) {
            if ((exponent & 1u) != 0) {
                result = multiply(result, square);
            }
            square = multiply(square, square);
        }
        return result;
    }

    // slices[k][v]: state after byte v and then k zero bytes.
    static constexpr std::array<Table, 8> make_slices() {
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

    // Eight bytes a step, any processor and byte order.
    static std::uint32_t extend_portable(std::uint32_t state, ConstBytes bytes) {
        static constexpr std::array<Table, 8> slices = make_slices();
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

    // Checksum of A followed by B. The inversions cancel: A's state, pushed through B's zero
    // bytes, adds to B's own checksum.
    static std::uint32_t combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t length_b) {
        static constexpr Powers powers = make_powers();
        for (std::size_t place = 0; length_b != 0; ++place, length_b >>= 4) {
            const std::size_t digit = length_b & 15u;
            if (digit != 0) {
                crc_a = multiply(powers[place][digit], crc_a);
            }
        }
        return crc_a ^ crc_b;
    }

  private:
    // powers[p][d] = x^(8 * d * 16^p): feeding a number of zero bytes is one product for each of
    // the number's hexadecimal digits.
    using Powers = std::array<std::array<std::uint32_t, 16>, 16>;

    static constexpr Powers make_powers() {
        Powers powers{};
        std::uint32_t unit = power(8);
        for (auto &digits : powers) {
            digits[0] = one;
            for (std::size_t digit = 1; digit < digits.size(); ++digit) {
                digits[digit] = multiply(digits[digit - 1], unit);
            }
            unit = multiply(digits[15], unit);
        }
        return powers;
    }
};

} // namespace lowtide
