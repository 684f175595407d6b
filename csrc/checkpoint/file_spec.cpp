#include "file_spec.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace lowtide::checkpoint {
namespace {

constexpr std::uint64_t largest = std::numeric_limits<std::uint64_t>::max();

std::string at(const char *array, std::size_t index, std::uint64_t found) {
    return std::string(array) + "[" + std::to_string(index) + "]: got " + std::to_string(found);
}

} // namespace

void FileSpec::fail(const std::string &text) const {
    throw std::invalid_argument("plan of " + path + ": " + text);
}

void FileSpec::prepare() {
    const std::size_t pieces = offsets.size();
    if (lengths.size() != pieces || addresses.size() != pieces || entries.size() != pieces) {
        fail("offsets, lengths, addresses and entries have " + std::to_string(pieces) + ", " +
             std::to_string(lengths.size()) + ", " + std::to_string(addresses.size()) + " and " +
             std::to_string(entries.size()) + " elements, allowed is one for each piece");
    }
    // Entries are numbered from 0, so there cannot be more of them than of what names them.
    const std::uint64_t allowed =
        std::min<std::uint64_t>(pieces + patches.size(), std::numeric_limits<std::int32_t>::max());
    for (std::size_t i = 0; i < pieces; ++i) {
        const std::int64_t entry = entries[i];
        if (entry < literal_entry || entry >= static_cast<std::int64_t>(allowed)) {
            fail("entries[" + std::to_string(i) + "]: got " + std::to_string(entry) +
                 ", allowed is -1 to " + std::to_string(static_cast<std::int64_t>(allowed) - 1));
        }
        entry_count = std::max(entry_count, static_cast<std::uint32_t>(entry + 1));
    }
    for (std::size_t i = 0; i < patches.size(); ++i) {
        if (patches[i].entry >= allowed) {
            fail(at("patches", i, patches[i].entry) + " as entry, allowed is 0 to " +
                 std::to_string(allowed - 1));
        }
        entry_count = std::max(entry_count, patches[i].entry + 1);
    }
    check_pieces();
    find_entries();
    std::sort(patches.begin(), patches.end(),
              [](const Patch &a, const Patch &b) { return a.position < b.position; });
    check_patches();
}

void FileSpec::check_pieces() const {
    std::uint64_t covered = 0;
    for (std::size_t i = 0; i < offsets.size(); ++i) {
        if (offsets[i] != covered) {
            fail(at("offsets", i, offsets[i]) + ", allowed is " + std::to_string(covered) +
                 ": pieces follow each other without gaps");
        }
        if (lengths[i] == 0 || lengths[i] > size - covered) {
            fail(at("lengths", i, lengths[i]) + ", allowed is 1 to " +
                 std::to_string(size - covered) + ", what is left of the file's size");
        }
        covered += lengths[i];
        if (addresses[i] == 0 || addresses[i] > largest - lengths[i]) {
            fail(at("addresses", i, addresses[i]) + ", allowed is the address of memory");
        }
        const bool is_inside = addresses[i] >= literals_address && lengths[i] <= literals_bytes &&
                               addresses[i] - literals_address <= literals_bytes - lengths[i];
        if (entries[i] == literal_entry && !is_inside) {
            fail(at("addresses", i, addresses[i]) +
                 ", allowed for a literal is a place in the memory of the literals");
        }
    }
    if (covered != size) {
        fail("the pieces cover " + std::to_string(covered) + " bytes, allowed is the size, " +
             std::to_string(size));
    }
}

void FileSpec::find_entries() {
    places.assign(offsets.size(), 0);
    entry_bytes.assign(entry_count, 0);
    entry_begins.assign(entry_count, 0);
    entry_ends.assign(entry_count, 0);
    for (std::size_t i = 0; i < offsets.size(); ++i) {
        if (entries[i] != literal_entry) {
            const auto entry = static_cast<std::size_t>(entries[i]);
            places[i] = entry_bytes[entry];
            if (places[i] == 0) {
                entry_begins[entry] = offsets[i];
            }
            entry_bytes[entry] += lengths[i];
            entry_ends[entry] = offsets[i] + lengths[i];
        }
    }
}

void FileSpec::check_patches() const {
    for (std::size_t i = 0; i < patches.size(); ++i) {
        const std::uint64_t position = patches[i].position;
        if (literals_bytes < patch_bytes || position > literals_bytes - patch_bytes) {
            fail("a patch at " + std::to_string(position) + ", allowed is a place for 4 bytes in " +
                 std::to_string(literals_bytes) + " bytes of literals");
        }
        if (i > 0 && position - patches[i - 1].position < patch_bytes) {
            fail("patches at " + std::to_string(patches[i - 1].position) + " and " +
                 std::to_string(position) + ", allowed are places that do not overlap");
        }
    }
    for (std::size_t i = 0; i < offsets.size(); ++i) {
        if (entries[i] != literal_entry) {
            continue;
        }
        const std::uint64_t begin = addresses[i] - literals_address;
        std::size_t number = first_patch_behind(begin);
        for (; number < patches.size() && patches[number].position < begin + lengths[i]; ++number) {
            const std::uint32_t entry = patches[number].entry;
            if (offsets[i] < entry_ends[entry]) {
                fail("a patch at " + std::to_string(patches[number].position) +
                     " lies in the literal at file offset " + std::to_string(offsets[i]) +
                     ", allowed is one behind the end of its entry " + std::to_string(entry) +
                     ", " + std::to_string(entry_ends[entry]));
            }
        }
    }
}

void FileSpec::check_begins_with(const FileSpec &begin) const {
    bool is_same = path == begin.path && offsets.size() >= begin.offsets.size();
    for (std::size_t i = 0; is_same && i < begin.offsets.size(); ++i) {
        is_same = offsets[i] == begin.offsets[i] && lengths[i] == begin.lengths[i] &&
                  entries[i] == begin.entries[i] &&
                  (entries[i] == literal_entry || addresses[i] == begin.addresses[i]);
    }
    if (!is_same) {
        fail("it does not begin with the pieces that were submitted");
    }
}

std::size_t FileSpec::first_patch_behind(std::uint64_t position) const {
    const auto found =
        std::partition_point(patches.begin(), patches.end(), [position](const Patch &patch) {
            return patch.position + patch_bytes <= position;
        });
    return static_cast<std::size_t>(found - patches.begin());
}

std::vector<std::size_t> FileSpec::chunks_of(const Stretch &memory, std::size_t chunk_bytes) const {
    std::vector<std::size_t> chunks;
    for (std::size_t i = 0; i < offsets.size(); ++i) {
        const std::uint64_t begin = std::max(memory.begin, addresses[i]);
        const std::uint64_t end = std::min(memory.end, addresses[i] + lengths[i]);
        if (entries[i] == literal_entry || begin >= end) {
            continue;
        }
        const std::uint64_t last = (offsets[i] + (end - 1 - addresses[i])) / chunk_bytes;
        for (std::uint64_t chunk = (offsets[i] + (begin - addresses[i])) / chunk_bytes;
             chunk <= last; ++chunk) {
            if (chunks.empty() || chunks.back() < chunk) { // neighbours share one
                chunks.push_back(static_cast<std::size_t>(chunk));
            }
        }
    }
    return chunks;
}

} // namespace lowtide::checkpoint
