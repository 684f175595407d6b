// CRC32C (Castagnoli): reflected polynomial 0x82F63B78, initial value and final xor 0xFFFFFFFF,
// as in iSCSI (RFC 3720), ext4 and Btrfs.
#pragma once

#include <cstdint>

#include "span.hpp"

namespace lowtide {

// Checksum of `bytes`, continuing from `seed`, the checksum of what came before (0: nothing).
// Uses the fastest way this processor has.
std::uint32_t crc32c(ConstBytes bytes, std::uint32_t seed = 0);

// Table-driven, eight bytes a step, any processor and byte order.
std::uint32_t crc32c_portable(ConstBytes bytes, std::uint32_t seed = 0);

// The SSE4.2 instruction on three interleaved lanes. Throws std::runtime_error on a processor
// (or in a build) that lacks it.
std::uint32_t crc32c_sse42(ConstBytes bytes, std::uint32_t seed = 0);

// Checksum of A followed by B, from crc32c(A), crc32c(B) and the length of B; logarithmic in it.
std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t length_b);

// What crc32c() uses here: "sse4.2" or "portable".
const char *crc32c_implementation();

} // namespace lowtide
