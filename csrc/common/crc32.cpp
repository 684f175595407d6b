#include "crc32.hpp"

#include <cstddef>
#include <stdexcept>

#include "cpu_features.hpp"
#include "crc_algebra.hpp"

#if LOWTIDE_X86
#include <emmintrin.h>
#include <wmmintrin.h>
#endif

namespace lowtide {
namespace {

using Algebra = CrcAlgebra<0xEDB88320u>;

#if LOWTIDE_X86

// The method of V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction" (Intel, 2009): 128 bits of the message are carried over a fixed distance by two
// products, so the message shrinks to its last 128 bits, which have the same remainder.
//
// A register holds x^127 in its lowest bit, as the message comes. The product of two reflected
// halves arrives one place too low, so each factor is one power of x short.
constexpr std::size_t width = 16;    // bytes in a register
constexpr std::size_t registers = 4; // independent chains hide the multiplier's latency

struct Factors {
    std::uint64_t low;  // for the half that comes first, 64 places higher
    std::uint64_t high; // for the other one

    explicit constexpr Factors(std::uint64_t bytes)
        : low(std::uint64_t{Algebra::power(8 * bytes + 63)} << 32),
          high(std::uint64_t{Algebra::power(8 * bytes - 1)} << 32) {}
};

constexpr Factors over_all(registers *width);
constexpr Factors over_one(width);

LOWTIDE_TARGET("pclmul")
inline __m128i load_register(const unsigned char *p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}

LOWTIDE_TARGET("pclmul")
inline __m128i carry(__m128i value, __m128i factors) {
    return _mm_xor_si128(_mm_clmulepi64_si128(value, factors, 0x00),
                         _mm_clmulepi64_si128(value, factors, 0x11));
}

LOWTIDE_TARGET("pclmul")
inline __m128i as_register(Factors factors) {
    return _mm_set_epi64x(static_cast<long long>(factors.high),
                          static_cast<long long>(factors.low));
}

LOWTIDE_TARGET("pclmul")
std::uint32_t extend_pclmul(std::uint32_t state, ConstBytes bytes) {
    constexpr std::size_t step = registers * width;
    if (bytes.size() < step) {
        return Algebra::extend_portable(state, bytes);
    }
    const unsigned char *p = bytes.begin();
    const unsigned char *const end = bytes.end();
    const __m128i all = as_register(over_all);
    const __m128i one = as_register(over_one);
    // The state stands before the message, so it adds to the message's first 32 bits.
    __m128i a = _mm_xor_si128(load_register(p), _mm_cvtsi32_si128(static_cast<int>(state)));
    __m128i b = load_register(p + width);
    __m128i c = load_register(p + 2 * width);
    __m128i d = load_register(p + 3 * width);
    for (p += step; static_cast<std::size_t>(end - p) >= step; p += step) {
        a = _mm_xor_si128(carry(a, all), load_register(p));
        b = _mm_xor_si128(carry(b, all), load_register(p + width));
        c = _mm_xor_si128(carry(c, all), load_register(p + 2 * width));
        d = _mm_xor_si128(carry(d, all), load_register(p + 3 * width));
    }
    a = _mm_xor_si128(carry(a, one), b);
    a = _mm_xor_si128(carry(a, one), c);
    a = _mm_xor_si128(carry(a, one), d);
    for (; static_cast<std::size_t>(end - p) >= width; p += width) {
        a = _mm_xor_si128(carry(a, one), load_register(p));
    }
    unsigned char last[width];
    _mm_storeu_si128(reinterpret_cast<__m128i *>(last), a);
    state = Algebra::extend_portable(0, ConstBytes(last, width));
    return Algebra::extend_portable(state, ConstBytes(p, static_cast<std::size_t>(end - p)));
}

#endif // LOWTIDE_X86

} // namespace

std::uint32_t crc32_portable(ConstBytes bytes, std::uint32_t seed) {
    return ~Algebra::extend_portable(~seed, bytes);
}

std::uint32_t crc32_pclmul(ConstBytes bytes, std::uint32_t seed) {
#if LOWTIDE_X86
    if (cpu_features().pclmul) {
        return ~extend_pclmul(~seed, bytes);
    }
#endif
    (void)bytes;
    (void)seed;
    throw std::runtime_error("crc32_pclmul: this processor has no PCLMULQDQ; use crc32()");
}

std::uint32_t crc32(ConstBytes bytes, std::uint32_t seed) {
#if LOWTIDE_X86
    if (cpu_features().pclmul) {
        return ~extend_pclmul(~seed, bytes);
    }
#endif
    return crc32_portable(bytes, seed);
}

std::uint32_t crc32_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t length_b) {
    return Algebra::combine(crc_a, crc_b, length_b);
}

const char *crc32_implementation() { return cpu_features().pclmul ? "pclmul" : "portable"; }

} // namespace lowtide
