#include "records.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "file_spec.hpp"

namespace lowtide::checkpoint {
namespace {

constexpr std::uint64_t alignment = 64;              // of tensors in the file, as torch aligns them
constexpr std::uint64_t direct_bytes = 1 << 20;      // from here on offsets follow addresses
constexpr std::uint64_t largest_small = 0xFFFFFFFFu; // zip64 begins here
constexpr std::uint64_t local_bytes = 30;
constexpr std::uint64_t shortest_extra = 4;
constexpr std::uint16_t has_descriptor = 1 << 3;
constexpr std::uint16_t date = 0x21; // 1 January 1980
constexpr std::uint16_t padding_id = 0x4246;
constexpr std::size_t crc_in_descriptor = 4;
constexpr std::size_t crc_in_central = 16;

// Appends numbers in zip's byte order.
class Text {
  public:
    explicit Text(std::string &target) : target_(target) {}

    template <typename T> Text &add(std::uint64_t value) {
        for (std::size_t i = 0; i < sizeof(T); ++i) {
            target_.push_back(static_cast<char>(value >> (8 * i) & 0xFF));
        }
        return *this;
    }
    Text &u16(std::uint64_t value) { return add<std::uint16_t>(value); }
    Text &u32(std::uint64_t value) { return add<std::uint32_t>(value); }
    Text &u64(std::uint64_t value) { return add<std::uint64_t>(value); }
    Text &text(const std::string &value) {
        target_ += value;
        return *this;
    }

  private:
    std::string &target_;
};

class Layout {
  public:
    explicit Layout(const ArchiveEnd &end) : end_(end) { made_.offset = end.offset; }

    void add(std::uint64_t number, std::uint64_t address, std::uint64_t size) {
        const std::string name = "archive/data/" + std::to_string(number);
        const bool is_large = size >= largest_small;
        const std::uint64_t begin = made_.offset;
        put_local(name, address, size, is_large);
        end_run();
        const auto entry = static_cast<std::int64_t>(number);
        if (size > 0) {
            put_piece(made_.offset, size, static_cast<std::int64_t>(address), entry);
            made_.offset += size;
            put_patch(made_.patches, end_.literals + made_.literals.size() + crc_in_descriptor,
                      entry);
            put_patch(made_.central_patches, end_.central + made_.central.size() + crc_in_central,
                      entry);
        }
        put_descriptor(size, is_large);
        put_central(name, begin, size, is_large);
    }

    Records take() {
        end_run();
        return std::move(made_);
    }

  private:
    // The extra field is so long that the data begins where it is wanted.
    void put_local(const std::string &name, std::uint64_t address, std::uint64_t size,
                   bool is_large) {
        const bool follows = size >= direct_bytes && address % alignment == 0;
        const std::uint64_t step = follows ? page_bytes : alignment;
        const std::uint64_t wanted = follows ? address % page_bytes : 0;
        std::uint64_t extra = is_large ? 20 : 0;
        const std::uint64_t reached = made_.offset + local_bytes + name.size() + extra;
        std::uint64_t padding = (wanted + step - reached % step) % step;
        if (padding != 0 && padding < shortest_extra) {
            padding += step;
        }
        extra += padding;
        const std::size_t before = made_.literals.size();
        Text text(made_.literals);
        text.u32(0x04034B50).u16(is_large ? 45 : 20).u16(has_descriptor).u16(0).u16(0).u16(date);
        text.u32(0).u32(is_large ? largest_small : 0).u32(is_large ? largest_small : 0);
        text.u16(name.size()).u16(extra).text(name);
        if (is_large) {
            text.u16(1).u16(16).u64(0).u64(0);
        }
        if (padding != 0) {
            text.u16(padding_id).u16(padding - shortest_extra);
            made_.literals.append(padding - shortest_extra, '\0');
        }
        made_.offset += made_.literals.size() - before;
    }

    void put_descriptor(std::uint64_t size, bool is_large) {
        const std::size_t before = made_.literals.size();
        Text text(made_.literals);
        text.u32(0x08074B50).u32(0);
        if (is_large) {
            text.u64(size).u64(size);
        } else {
            text.u32(size).u32(size);
        }
        made_.offset += made_.literals.size() - before;
    }

    void put_central(const std::string &name, std::uint64_t begin, std::uint64_t size,
                     bool is_large) {
        const bool is_far = begin >= largest_small;
        const std::uint64_t wide = 8 * ((is_large ? 2u : 0u) + (is_far ? 1u : 0u));
        const std::uint64_t small = is_large ? largest_small : size;
        Text text(made_.central);
        text.u32(0x02014B50).u16(45).u16(is_large || is_far ? 45 : 20).u16(has_descriptor);
        text.u16(0).u16(0).u16(date).u32(0).u32(small).u32(small);
        text.u16(name.size()).u16(wide == 0 ? 0 : 4 + wide).u16(0).u16(0).u16(0).u32(0);
        text.u32(std::min(begin, largest_small)).text(name);
        if (wide != 0) {
            text.u16(1).u16(wide);
        }
        if (is_large) {
            text.u64(size).u64(size);
        }
        if (is_far) {
            text.u64(begin);
        }
    }

    // Makes one piece of the literals written since the last one.
    void end_run() {
        const std::size_t length = made_.literals.size() - run_begin_;
        if (length != 0) {
            put_piece(made_.offset - length, length,
                      static_cast<std::int64_t>(end_.literals + run_begin_), literal_entry);
            run_begin_ = made_.literals.size();
        }
    }

    void put_piece(std::uint64_t offset, std::uint64_t length, std::int64_t place,
                   std::int64_t entry) {
        for (const std::int64_t each :
             {static_cast<std::int64_t>(offset), static_cast<std::int64_t>(length), place, entry}) {
            made_.pieces.push_back(each);
        }
    }

    static void put_patch(std::vector<std::int64_t> &patches, std::uint64_t position,
                          std::int64_t entry) {
        patches.push_back(static_cast<std::int64_t>(position));
        patches.push_back(entry);
    }

    const ArchiveEnd end_;
    Records made_;
    std::size_t run_begin_ = 0;
};

} // namespace

Records lay_out_records(const std::uint64_t *addresses, const std::uint64_t *sizes,
                        std::size_t count, const ArchiveEnd &end) {
    Layout layout(end);
    for (std::size_t i = 0; i < count; ++i) {
        layout.add(end.number + i, addresses[i], sizes[i]);
    }
    return layout.take();
}

} // namespace lowtide::checkpoint
