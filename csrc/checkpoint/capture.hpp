// Copies one chunk of a file out of live memory and computes its checksums on the way.
#pragma once

#include <cstdint>
#include <vector>

#include "common/span.hpp"
#include "file_spec.hpp"

namespace lowtide::checkpoint {

// A stretch of a chunk with one checksum.
struct Part {
    enum class Kind { literal, entry, patch };

    Kind kind;
    std::uint32_t crc;   // of a patch: known once its entry is complete
    std::uint64_t bytes; // of a patch: 1 to 4, where a chunk or a piece ends inside it
    std::uint32_t entry; // of an entry and of a patch
    std::uint64_t begin; // offset in the chunk
    std::uint32_t skip;  // of a patch: how many of its four bytes stand before this part
};

// Copies file bytes [begin, begin + slab.size()) into `slab` and describes them in `parts`. Needs
// no other chunk, so chunks may be captured in any order and at once: the patches are left open
// until `fold`.
void capture(const FileSpec &spec, std::uint64_t begin, Bytes slab, std::vector<Part> &parts);

// The memory of file bytes [begin, begin + bytes) if they are part of a single entry's piece,
// lie in memory as direct I/O needs them and fill whole pages; otherwise nullptr.
const unsigned char *direct_source(const FileSpec &spec, std::uint64_t begin, std::size_t bytes);

// Describes such a chunk in `parts` without copying it.
void capture_in_place(const FileSpec &spec, std::uint64_t begin, ConstBytes source,
                      std::vector<Part> &parts);

// Adds the parts of a chunk to the checksums of the file's entries, fills in its patches and
// returns its own checksum. Call it for the chunks of a file in order.
std::uint32_t fold(std::vector<Part> &parts, std::vector<std::uint32_t> &entry_crcs, Bytes slab);

} // namespace lowtide::checkpoint
