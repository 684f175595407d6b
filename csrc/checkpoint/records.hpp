// The members of a zip archive that hold tensors: headers, and which bytes stand where.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lowtide::checkpoint {

// What lowtide.checkpoint.files.archive.Archive.add_records adds to the archive.
struct Records {
    std::string literals;                      // local headers and data descriptors
    std::string central;                       // entries of the central directory
    std::vector<std::int64_t> pieces;          // offset, length, address or literal position, entry
    std::vector<std::int64_t> patches;         // position in the literals, entry
    std::vector<std::int64_t> central_patches; // position in the central directory, entry
    std::uint64_t offset = 0;                  // in the file, behind the last member
};

// Where the archive stands before them.
struct ArchiveEnd {
    std::uint64_t number = 0;   // of the next record
    std::uint64_t offset = 0;   // in the file
    std::uint64_t literals = 0; // bytes of literals, all in pieces
    std::uint64_t central = 0;  // bytes of the central directory
};

// Both arrays have `count` elements.
Records lay_out_records(const std::uint64_t *addresses, const std::uint64_t *sizes,
                        std::size_t count, const ArchiveEnd &end);

} // namespace lowtide::checkpoint
