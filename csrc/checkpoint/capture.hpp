// Copies one chunk of a file out of live memory and computes its checksums on the way.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "common/span.hpp"
#include "file_spec.hpp"

namespace lowtide::checkpoint {

// A stretch of a chunk with one checksum.
struct Part {
    enum class Kind { literal, entry, patch };

    Kind kind;           // a patch becomes a literal when it is filled in
    std::uint32_t crc;   // of a patch: known once its entry is complete
    std::uint64_t bytes; // of a patch: 1 to 4, where a chunk or a piece ends inside it
    std::uint32_t entry; // of an entry and of a patch
    std::uint64_t begin; // offset in the chunk
    std::uint64_t place; // of an entry: offset in it; of a patch: how many of its four bytes stand
                         // before this part
};

// Checksums of a file's entries, put together from parts that may come in any order.
class EntrySums {
  public:
    void add(const Part &part);

    // Whether all `bytes` of an entry have come.
    bool is_complete(std::uint32_t entry, std::uint64_t bytes) const;
    std::uint32_t crc(std::uint32_t entry) const;

  private:
    struct Sum {
        std::uint32_t crc = 0;
        std::uint64_t bytes = 0;
    };

    std::vector<Sum> sums_; // of each entry, from its beginning as far as there is no gap
    std::map<std::pair<std::uint32_t, std::uint64_t>, Sum> behind_; // the gap, by entry and place
};

// Bytes of a file that were not known when their chunk was written.
struct LateBytes {
    std::uint64_t offset;
    std::array<unsigned char, patch_bytes> bytes;
    std::size_t count;
};

// Copies file bytes [begin, begin + slab.size()) into `slab` and describes them in `parts`. Needs
// no other chunk, so chunks may be captured in any order and at once: patches are left open.
void capture(const FileSpec &spec, std::uint64_t begin, Bytes slab, std::vector<Part> &parts);

// The memory of file bytes [begin, begin + bytes) if they are part of a single entry's piece,
// lie in memory as direct I/O needs them and fill whole pages; otherwise nullptr.
const unsigned char *direct_source(const FileSpec &spec, std::uint64_t begin, std::size_t bytes);

// Describes such a chunk in `parts` without copying it.
void capture_in_place(const FileSpec &spec, std::uint64_t begin, ConstBytes source,
                      std::vector<Part> &parts);

// Fills in a chunk's patches of complete entries; tells whether no patch is open any more. If the
// chunk has left its slab, which is empty then, they go to `late`; `begin` is its offset.
bool fill_in(const FileSpec &spec, std::vector<Part> &parts, const EntrySums &sums, Bytes slab,
             std::uint64_t begin, std::vector<LateBytes> &late);

// The checksum of a chunk without open patches.
std::uint32_t chunk_crc(const std::vector<Part> &parts);

} // namespace lowtide::checkpoint
