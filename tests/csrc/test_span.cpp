// Run by tests/core/test_build.py: every checked access of Span, in bounds and out of bounds.
#include <cstdint>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

#include "common/crc32c.hpp"
#include "common/span.hpp"

namespace {

int failures = 0;

void expect(bool is_true, const char *what) {
    if (!is_true) {
        std::fprintf(stderr, "FAILED: %s\n", what);
        ++failures;
    }
}

template <typename Function> bool throws_out_of_range(Function function) {
    try {
        function();
    } catch (const std::out_of_range &) {
        return true;
    }
    return false;
}

} // namespace

int main() {
    using lowtide::Bytes;
    using lowtide::ConstBytes;
    constexpr std::size_t huge = std::numeric_limits<std::size_t>::max();

    std::vector<unsigned char> memory(16);
    const Bytes all(memory.data(), memory.size());
    lowtide::store<std::uint32_t>(all, 12, 0xA1B2C3D4u);
    const ConstBytes read = all; // writable converts to read-only

    expect(lowtide::load<std::uint32_t>(read, 12) == 0xA1B2C3D4u, "store then load");
    expect(all.subspan(4, 12).size() == 12, "subspan up to the end");
    expect(all.subspan(16, 0).empty(), "empty subspan at the end");
    expect(all.first(3).data() == memory.data(), "first");
    expect(all.last(3).data() == memory.data() + 13, "last");
    expect(all.drop(16).empty(), "drop everything");
    expect(all.size_bytes() == 16, "size in bytes");

    expect(throws_out_of_range([&] { all.subspan(5, 12); }), "subspan over the end");
    expect(throws_out_of_range([&] { all.subspan(17, 0); }), "subspan behind the end");
    expect(throws_out_of_range([&] { all.subspan(2, huge); }), "count that would wrap around");
    expect(throws_out_of_range([&] { all.subspan(huge, 2); }), "offset that would wrap around");
    expect(throws_out_of_range([&] { all.first(17); }), "first over the end");
    expect(throws_out_of_range([&] { all.last(17); }), "last over the end");
    expect(throws_out_of_range([&] { all.drop(17); }), "drop over the end");
    expect(throws_out_of_range([&] { all.at(16); }), "at");
    expect(throws_out_of_range([&] { all[16] = 1; }), "operator[] with LOWTIDE_CHECKED");
    expect(throws_out_of_range([&] { lowtide::load<std::uint32_t>(read, 13); }), "load");
    expect(throws_out_of_range([&] { lowtide::store<std::uint16_t>(all, 15, 1); }), "store");

    bool refuses_null = false;
    try {
        const Bytes nowhere(nullptr, 1);
    } catch (const std::invalid_argument &) {
        refuses_null = true;
    }
    expect(refuses_null, "null pointer with a size");
    expect(Bytes(nullptr, 0).empty(), "null pointer without a size");

    // Every length and alignment around the lanes; the address sanitizer watches the ends.
    for (std::size_t size = 0; size < 1300; ++size) {
        const std::vector<unsigned char> data(size, static_cast<unsigned char>(size));
        const ConstBytes bytes(data.data(), data.size());
        expect(lowtide::crc32c(bytes) == lowtide::crc32c_portable(bytes), "crc32c of short data");
    }
    return failures == 0 ? 0 : 1;
}
