#include "capture.hpp"

#include <algorithm>

#include "common/crc32.hpp"
#include "stream_copy.hpp"

namespace lowtide::checkpoint {
namespace {

// Fits into the first-level cache, so that the copy finds what the checksum has just read.
constexpr std::size_t block_bytes = 8 * 1024;

std::size_t piece_at(const FileSpec &spec, std::uint64_t offset) {
    const auto behind = std::upper_bound(spec.offsets.begin(), spec.offsets.end(), offset);
    return static_cast<std::size_t>(behind - spec.offsets.begin()) - 1;
}

const unsigned char *memory_at(std::uint64_t address) {
    return reinterpret_cast<const unsigned char *>(static_cast<std::uintptr_t>(address));
}

// Fills one slab from its beginning to its end.
class Filler {
  public:
    Filler(const FileSpec &spec, Bytes slab, std::vector<Part> &parts)
        : spec_(spec), slab_(slab), parts_(parts) {}

    void add_entry(std::uint64_t address, std::size_t bytes, std::uint32_t entry,
                   std::uint64_t place) {
        copy(Part::Kind::entry, address, bytes, entry, place);
    }

    // Copies a literal, with a part of its own for each patch in it.
    void add_literal(std::uint64_t address, std::size_t bytes) {
        const std::uint64_t end = address - spec_.literals_address + bytes;
        std::uint64_t position = address - spec_.literals_address;
        for (std::size_t i = spec_.first_patch_behind(position); position < end; ++i) {
            const bool is_patched = i < spec_.patches.size() && spec_.patches[i].position < end;
            const std::uint64_t plain_end = is_patched ? spec_.patches[i].position : end;
            if (plain_end > position) {
                copy(Part::Kind::literal, spec_.literals_address + position, plain_end - position,
                     0, 0);
                position = plain_end;
            }
            if (is_patched) {
                const Patch &patch = spec_.patches[i];
                const std::uint64_t patch_end = std::min(patch.position + patch_bytes, end);
                parts_.push_back({Part::Kind::patch, 0, patch_end - position, patch.entry, filled_,
                                  position - patch.position});
                filled_ += patch_end - position;
                position = patch_end;
            }
        }
    }

    std::size_t filled() const { return filled_; }

  private:
    void copy(Part::Kind kind, std::uint64_t address, std::size_t bytes, std::uint32_t entry,
              std::uint64_t place) {
        if (parts_.empty() || parts_.back().kind != kind || parts_.back().entry != entry) {
            parts_.push_back({kind, 0, 0, entry, filled_, place});
        }
        Part &part = parts_.back();
        const Bytes target = slab_.subspan(filled_, bytes);
        const unsigned char *source = memory_at(address);
        for (std::size_t done = 0; done < bytes; done += block_bytes) {
            const std::size_t block = std::min(block_bytes, bytes - done);
            part.crc = crc32(ConstBytes(source + done, block), part.crc);
            stream_copy(target.data() + done, source + done, block);
        }
        part.bytes += bytes;
        filled_ += bytes;
    }

    const FileSpec &spec_;
    const Bytes slab_;
    std::vector<Part> &parts_;
    std::size_t filled_ = 0;
};

} // namespace

void capture(const FileSpec &spec, std::uint64_t begin, Bytes slab, std::vector<Part> &parts) {
    Filler filler(spec, slab, parts);
    for (std::size_t piece = piece_at(spec, begin); filler.filled() < slab.size(); ++piece) {
        const std::uint64_t skip = begin + filler.filled() - spec.offsets[piece];
        const std::size_t bytes = static_cast<std::size_t>(
            std::min<std::uint64_t>(spec.lengths[piece] - skip, slab.size() - filler.filled()));
        const std::uint64_t address = spec.addresses[piece] + skip;
        if (spec.entries[piece] == literal_entry) {
            filler.add_literal(address, bytes);
        } else {
            filler.add_entry(address, bytes, static_cast<std::uint32_t>(spec.entries[piece]),
                             spec.places[piece] + skip);
        }
    }
}

const unsigned char *direct_source(const FileSpec &spec, std::uint64_t begin, std::size_t bytes) {
    const std::size_t piece = piece_at(spec, begin);
    const std::uint64_t skip = begin - spec.offsets[piece];
    const std::uint64_t address = spec.addresses[piece] + skip;
    const bool is_suitable = spec.entries[piece] != literal_entry &&
                             spec.lengths[piece] - skip >= bytes && address % page_bytes == 0 &&
                             bytes % page_bytes == 0;
    return is_suitable ? memory_at(address) : nullptr;
}

void capture_in_place(const FileSpec &spec, std::uint64_t begin, ConstBytes source,
                      std::vector<Part> &parts) {
    const std::size_t piece = piece_at(spec, begin);
    const auto entry = static_cast<std::uint32_t>(spec.entries[piece]);
    const std::uint64_t place = spec.places[piece] + (begin - spec.offsets[piece]);
    parts.push_back({Part::Kind::entry, crc32(source), source.size(), entry, 0, place});
}

void EntrySums::add(const Part &part) {
    if (part.entry >= sums_.size()) {
        sums_.resize(part.entry + std::size_t{1});
    }
    Sum &sum = sums_[part.entry];
    if (part.place != sum.bytes) {
        behind_[{part.entry, part.place}] = {part.crc, part.bytes};
        return;
    }
    const auto append = [&sum](std::uint32_t crc, std::uint64_t bytes) {
        sum.crc = sum.bytes == 0 ? crc : crc32_combine(sum.crc, crc, bytes);
        sum.bytes += bytes;
    };
    append(part.crc, part.bytes);
    for (auto next = behind_.find({part.entry, sum.bytes}); next != behind_.end();
         next = behind_.find({part.entry, sum.bytes})) {
        append(next->second.crc, next->second.bytes);
        behind_.erase(next);
    }
}

bool EntrySums::is_complete(std::uint32_t entry, std::uint64_t bytes) const {
    return bytes == 0 || (entry < sums_.size() && sums_[entry].bytes == bytes);
}

std::uint32_t EntrySums::crc(std::uint32_t entry) const {
    return entry < sums_.size() ? sums_[entry].crc : 0;
}

bool fill_in(const FileSpec &spec, std::vector<Part> &parts, const EntrySums &sums, Bytes slab,
             std::uint64_t begin, std::vector<LateBytes> &late) {
    bool is_done = true;
    for (Part &part : parts) {
        if (part.kind != Part::Kind::patch) {
            continue;
        }
        if (!sums.is_complete(part.entry, spec.entry_bytes.at(part.entry))) {
            is_done = false;
            continue;
        }
        const std::uint32_t crc = sums.crc(part.entry);
        LateBytes found{begin + part.begin, {}, static_cast<std::size_t>(part.bytes)};
        for (std::size_t i = 0; i < found.count; ++i) {
            found.bytes.at(i) = static_cast<unsigned char>(crc >> (8 * (part.place + i)));
        }
        if (slab.empty()) {
            late.push_back(found);
        } else {
            const Bytes target = slab.subspan(part.begin, part.bytes);
            std::copy_n(found.bytes.begin(), found.count, target.begin());
        }
        part.crc = crc32(ConstBytes(found.bytes.data(), found.count));
        part.kind = Part::Kind::literal;
    }
    return is_done;
}

std::uint32_t chunk_crc(const std::vector<Part> &parts) {
    std::uint32_t crc = 0; // that of no bytes, which combine() takes as it is
    for (const Part &part : parts) {
        crc = crc == 0 ? part.crc : crc32_combine(crc, part.crc, part.bytes);
    }
    return crc;
}

} // namespace lowtide::checkpoint
