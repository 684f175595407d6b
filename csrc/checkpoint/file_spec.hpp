// What a writer is told about one file: where each of its bytes comes from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lowtide::checkpoint {

constexpr std::int32_t literal_entry = -1; // a piece that belongs to no checksummed entry
constexpr std::size_t page_bytes = 4096;   // alignment that direct I/O asks for
constexpr std::size_t patch_bytes = 4;     // a CRC-32, little-endian

struct Patch {
    std::uint64_t position; // in the literals
    std::uint32_t entry;    // whose CRC-32 goes there
};

// A stretch of live memory.
struct Stretch {
    std::uint64_t begin;
    std::uint64_t end;
};

// The meaning of the arrays is that of lowtide.checkpoint.plan.FilePlan.
struct FileSpec {
    std::string path;
    std::uint64_t size = 0;
    std::uint64_t expected = 0; // what the size of a partial file may become
    std::vector<std::uint64_t> offsets;
    std::vector<std::uint64_t> lengths;
    std::vector<std::uint64_t> addresses;
    std::vector<std::int32_t> entries;
    std::uint64_t literals_address = 0;
    std::uint64_t literals_bytes = 0;
    std::vector<Patch> patches; // ascending by position once prepared

    // Known once prepared.
    std::uint32_t entry_count = 0;
    std::vector<std::uint64_t> places;      // of each piece: where it begins in its entry
    std::vector<std::uint64_t> entry_bytes; // of each entry
    std::vector<std::uint64_t> entry_begins, entry_ends; // of each entry, in the file

    // Sorts the patches, counts the entries and checks everything that can be checked without
    // reading the memory. Throws std::invalid_argument, which says what is wrong where.
    void prepare();

    // Number of the first patch that ends behind `position` in the literals.
    std::size_t first_patch_behind(std::uint64_t position) const;

    // Throws std::invalid_argument unless the file begins with all pieces of `begin`. Literals may
    // have moved.
    void check_begins_with(const FileSpec &begin) const;

    // Numbers of the chunks that hold bytes of entries which lie in this memory, ascending.
    std::vector<std::size_t> chunks_of(const Stretch &memory, std::size_t chunk_bytes) const;

  private:
    void find_entries();
    void check_pieces() const;
    void check_patches() const;
    [[noreturn]] void fail(const std::string &text) const;
};

} // namespace lowtide::checkpoint
