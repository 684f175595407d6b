// Run by tests/checkpoint/test_writer_sanitizers.py under the address and the thread sanitizer:
// jobs from several threads, helpers, cancels, errors, the direct lane, closing in the middle.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/writer.hpp"
#include "common/crc32.hpp"

namespace {

using namespace lowtide::checkpoint;

constexpr std::size_t chunk_bytes = 4 * page_bytes;
std::atomic<int> failures{0};

void expect(bool is_true, const char *what) {
    if (!is_true) {
        std::fprintf(stderr, "FAILED: %s\n", what);
        ++failures;
    }
}

struct Free {
    void operator()(unsigned char *memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<unsigned char, Free>;

Memory page_aligned(std::size_t bytes) {
    const std::size_t pages = bytes / page_bytes + 1;
    return Memory(static_cast<unsigned char *>(std::aligned_alloc(page_bytes, pages * page_bytes)));
}

// A file of one entry, which lies as the direct lane needs it, and its patched checksum.
struct Source {
    explicit Source(std::size_t size, unsigned seed) : bytes(size), entry(page_aligned(size)) {
        for (std::size_t i = 0; i < size; ++i) {
            seed = seed * 1664525u + 1013904223u;
            entry.get()[i] = static_cast<unsigned char>(seed >> 24);
        }
    }

    FileSpec spec(const std::string &path) const {
        FileSpec spec;
        spec.path = path;
        spec.size = bytes + 8;
        spec.offsets = {0, bytes};
        spec.lengths = {bytes, 8};
        spec.addresses = {reinterpret_cast<std::uintptr_t>(entry.get()),
                          reinterpret_cast<std::uintptr_t>(literals)};
        spec.entries = {0, literal_entry};
        spec.literals_address = spec.addresses[1];
        spec.literals_bytes = 8;
        spec.patches = {{4, 0}};
        spec.prepare();
        return spec;
    }

    // As far as the first piece.
    FileSpec beginning(const std::string &path) const {
        FileSpec spec;
        spec.path = path;
        spec.size = bytes;
        spec.offsets = {0};
        spec.lengths = {bytes};
        spec.addresses = {reinterpret_cast<std::uintptr_t>(entry.get())};
        spec.entries = {0};
        spec.prepare();
        return spec;
    }

    std::string expected() const {
        std::string text(reinterpret_cast<const char *>(entry.get()), bytes);
        const std::uint32_t crc = lowtide::crc32(lowtide::ConstBytes(entry.get(), bytes));
        text += "crc:";
        for (int shift = 0; shift < 32; shift += 8) {
            text += static_cast<char>(crc >> shift);
        }
        return text;
    }

    std::size_t bytes;
    Memory entry;
    unsigned char literals[8] = {'c', 'r', 'c', ':', 0, 0, 0, 0};
};

std::string contents(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

void write_jobs(Writer &writer, const std::string &folder, int number) {
    for (int round = 0; round < 12; ++round) {
        const std::string path = folder + "/" + std::to_string(number);
        const std::size_t size = round % 3 == 0 ? 77 : 300'000 + 4096u * round;
        Source source(size, static_cast<unsigned>(number * 100 + round));
        const std::string expected = source.expected();
        std::vector<FileSpec> specs;
        specs.push_back(source.spec(path + ".a"));
        specs.push_back(source.spec(round % 4 == 3 ? folder + "/missing/file" : path + ".b"));
        const auto job = writer.submit(std::move(specs));
        if (round % 4 == 2) {
            writer.cancel(*job);
        }
        expect(writer.wait_captured(job, round % 2 == 0 ? -1 : 60), "captured");
        std::memset(source.entry.get(), 0, size); // a race, if anybody still reads it
        expect(writer.wait_settled(*job, 60), "settled");
        const JobState state = writer.state(*job);
        if (round % 4 != 2) { // a job may be done before it is cancelled
            expect(state.is_durable == (round % 4 < 2), "durable unless misplaced");
        }
        if (state.is_durable) {
            expect(contents(path + ".a") == expected, "contents of a");
            expect(contents(path + ".b") == expected, "contents of b");
            expect(writer.results(*job).size() == 2, "results");
        }
    }
}

void write_in_parts(Writer &writer, const std::string &folder, int number) {
    for (int round = 0; round < 12; ++round) {
        const std::string path = folder + "/parts" + std::to_string(number);
        Source source(round % 3 == 0 ? 77 : 300'000 + 4096u * round, static_cast<unsigned>(round));
        const std::string expected = source.expected();
        std::vector<FileSpec> specs;
        specs.push_back(source.beginning(path));
        const auto job = writer.submit(std::move(specs), true);
        writer.extend(job, source.beginning(path), true);
        if (round % 4 == 2) {
            writer.cancel(*job);
        } else if (round % 4 == 1) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2)); // until it has caught up
        }
        writer.extend(job, source.spec(path), false);
        expect(writer.wait_captured(job, 60), "captured");
        std::memset(source.entry.get(), 0, source.bytes);
        expect(writer.wait_settled(*job, 60), "settled");
        expect(writer.state(*job).is_durable == (round % 4 != 2), "durable unless cancelled");
        if (round % 4 != 2) {
            expect(contents(path) == expected, "contents");
        }
    }
}

// Overwrites the memory piece by piece, from the end on, while the rest is still being written.
void write_lazily(Writer &writer, const std::string &folder, int number) {
    for (int round = 0; round < 12; ++round) {
        const std::string path = folder + "/asked" + std::to_string(number);
        Source source(300'000 + 4096u * round, static_cast<unsigned>(round));
        const std::string expected = source.expected();
        std::vector<FileSpec> specs;
        specs.push_back(source.spec(path));
        const auto job = writer.submit(std::move(specs));
        const std::uint64_t begin = reinterpret_cast<std::uintptr_t>(source.entry.get());
        if (round % 2 == 0) {
            writer.hurry(job, {{begin, begin + source.bytes}});
        }
        for (std::size_t end = source.bytes, size = 0; end > 0; end -= size) {
            size = std::min<std::size_t>(end, 50'000);
            if (round % 4 == 3 && end < source.bytes / 2) {
                writer.cancel(*job);
            }
            const Stretch memory{begin + end - size, begin + end};
            expect(writer.wait_released(job, {memory}, 60), "released");
            std::memset(source.entry.get() + end - size, 0, size);
        }
        expect(writer.wait_settled(*job, 60), "settled");
        expect(round % 4 == 3 || writer.state(*job).is_durable, "durable unless cancelled");
        if (writer.state(*job).is_durable) {
            expect(contents(path) == expected, "contents");
        }
    }
}

void stress(const WriterOptions &options, const std::string &folder) {
    const auto writer = Writer::open(options);
    std::vector<std::thread> threads;
    for (int number = 0; number < 3; ++number) {
        threads.emplace_back([&, number] { write_jobs(*writer, folder, number); });
    }
    threads.emplace_back([&] { write_in_parts(*writer, folder, 0); });
    for (int number = 0; number < 2; ++number) {
        threads.emplace_back([&, number] { write_lazily(*writer, folder, number); });
    }
    for (auto &thread : threads) {
        writer->facts();
        thread.join();
    }
    Source late(3'000'000, 1);
    std::vector<FileSpec> specs;
    specs.push_back(late.spec(folder + "/late"));
    const auto job = writer->submit(std::move(specs));
    expect(writer->close(0), "closed in the middle");
    expect(writer->wait_captured(job, 0), "released by closing");
}

} // namespace

int main(int, char **arguments) {
    for (const char *io : {"threads", "io_uring"}) {
        for (const bool use_direct : {true, false}) {
            WriterOptions options;
            options.buffer_bytes = 3 * chunk_bytes;
            options.chunk_bytes = chunk_bytes;
            options.io = io;
            options.use_direct = use_direct;
            stress(options, arguments[1]);
            options.bytes_per_s = 200e6;
            stress(options, arguments[1]);
        }
    }
    return failures == 0 ? 0 : 1;
}
