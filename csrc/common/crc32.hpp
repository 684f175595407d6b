// CRC-32 of zip, zlib, gzip and PNG: reflected polynomial 0xEDB88320, initial value and final xor
// 0xFFFFFFFF (ISO 3309).
#pragma once

#include <cstdint>

#include "span.hpp"

namespace lowtide {

// Checksum of `bytes`, continuing from `seed`, the checksum of what came before (0: nothing).
// Uses the fastest way this processor has.
std::uint32_t crc32(ConstBytes bytes, std::uint32_t seed = 0);

// Table-driven, eight bytes a step, any processor and byte order.
std::uint32_t crc32_portable(ConstBytes bytes, std::uint32_t seed = 0);

// Carry-less multiplication, 64 bytes a step. Throws std::runtime_error on a processor (or in a
// build) that lacks it.
std::uint32_t crc32_pclmul(ConstBytes bytes, std::uint32_t seed = 0);

// Checksum of A followed by B, from crc32(A), crc32(B) and the length of B; logarithmic in it.
std::uint32_t crc32_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t length_b);

// What crc32() uses here: "pclmul" or "portable".
const char *crc32_implementation();

} // namespace lowtide
