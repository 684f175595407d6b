#include "stream_copy.hpp"

#include <cstdint>
#include <cstring>

#include "common/cpu_features.hpp"

#if LOWTIDE_X86
#include <immintrin.h>
#endif

namespace lowtide::checkpoint {

#if LOWTIDE_X86

namespace {

constexpr std::size_t line_bytes = 64;
constexpr std::size_t worthwhile_bytes = 1024; // shorter copies are better left to the caches

// Both copy `bytes`, a multiple of a line, to a target that begins a line.

LOWTIDE_TARGET("avx512f")
void stream_lines_avx512(unsigned char *target, const unsigned char *source, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += line_bytes) {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(target + i),
                            _mm512_loadu_si512(source + i));
    }
}

void stream_lines(unsigned char *target, const unsigned char *source, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += sizeof(__m128i)) {
        _mm_stream_si128(reinterpret_cast<__m128i *>(target + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i *>(source + i)));
    }
}

} // namespace

void stream_copy(unsigned char *target, const unsigned char *source, std::size_t bytes) {
    if (bytes < worthwhile_bytes) {
        std::memcpy(target, source, bytes);
        return;
    }
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) % line_bytes;
    const std::size_t lines = (bytes - head) / line_bytes * line_bytes;
    std::memcpy(target, source, head);
    if (cpu_features().avx512) {
        stream_lines_avx512(target + head, source + head, lines);
    } else {
        stream_lines(target + head, source + head, lines);
    }
    std::memcpy(target + head + lines, source + head + lines, bytes - head - lines);
    _mm_sfence(); // no lock orders these stores for the thread that reads them
}

#else

void stream_copy(unsigned char *target, const unsigned char *source, std::size_t bytes) {
    std::memcpy(target, source, bytes);
}

#endif

} // namespace lowtide::checkpoint
