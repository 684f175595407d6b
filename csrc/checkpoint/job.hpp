// A checkpoint under way: its files, and how far each of them is. Guarded by the writer's lock
// where nothing else is said.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capture.hpp"
#include "file_spec.hpp"
#include "io.hpp"
#include "slab_ring.hpp"

namespace lowtide::checkpoint {

using Clock = std::chrono::steady_clock; // CLOCK_MONOTONIC, as Python's time.monotonic

struct Job;
struct File;

// A chunk from the moment when a thread takes it until it is written or dropped.
struct Chunk : Write {
    std::shared_ptr<Job> job; // keeps itself and the file alive
    File *file = nullptr;
    std::size_t index = 0;
    std::size_t payload = 0;   // bytes of the file in it; `bytes` may be padded
    int slab = SlabRing::none; // or none: it is written from where the tensor lies
    bool is_hurried = false;   // captured because its memory is about to be overwritten
    std::vector<Part> parts;
    std::shared_ptr<const FileSpec> spec; // what is known of the file when it is taken
};

// A captured chunk with patches of entries of which not all has been captured.
struct Open {
    std::unique_ptr<Chunk> chunk; // or none: its bytes are on their way, without the patches
    std::shared_ptr<const FileSpec> spec;
    std::vector<Part> parts;
    std::size_t index;
};

struct File {
    enum class State { closed, opening, open, closing, done };
    enum class Stage : unsigned char { known, taken, captured };

    std::shared_ptr<const FileSpec> spec; // another one once the rest of the file is known
    bool is_partial = false;              // the rest is not known yet
    std::size_t chunks = 0;               // those whose content is known
    std::vector<Stage> stages;            // of each chunk
    std::size_t next = 0;                 // all before this one are taken
    std::size_t captured_chunks = 0;      // from the first on, without a gap
    std::size_t written = 0;
    std::size_t in_flight = 0; // chunks that exist
    bool is_folding = false;   // by one thread, which alone uses `sums` and `open` meanwhile
    std::deque<std::unique_ptr<Chunk>> captured;  // to be folded
    std::vector<std::unique_ptr<Chunk>> unopened; // waiting for the file
    EntrySums sums;
    std::vector<Open> open;
    std::vector<LateBytes> late; // to be written when all chunks are
    std::vector<std::uint32_t> chunk_crcs;
    State state = State::closed;
    int fd = -1;
    std::uint64_t reserved = 0; // bytes of it that have their place on the disk
    bool has_guessed = false;   // more may have been reserved than it came to
    bool is_reserving = false;  // more of them; it stays open meanwhile
    bool is_direct = false;
    bool is_padded = false; // the last write went beyond the end

    std::uint64_t chunk_begin(std::size_t index, std::size_t chunk_bytes) const {
        return static_cast<std::uint64_t>(index) * chunk_bytes;
    }

    // Moves `next` on and returns it.
    std::size_t first_untaken() {
        while (next < chunks && stages[next] != Stage::known) {
            ++next;
        }
        return next;
    }

    // Whether some thread has, or has had, all of the chunks from `first` to `last`.
    bool are_taken(std::size_t first, std::size_t last) const {
        for (std::size_t i = std::max(first, next); i <= last; ++i) {
            if (i >= chunks || stages[i] == Stage::known) {
                return false;
            }
        }
        return true;
    }
};

struct Failure {
    std::string operation;
    std::string path;
    int error = 0;
    std::uint64_t wanted_bytes = 0; // size of the file
};

struct Job {
    std::vector<std::unique_ptr<File>> files;
    std::size_t next_file = 0; // to capture from
    std::size_t durable_files = 0;
    std::uint64_t total_bytes = 0;
    std::uint64_t captured_bytes = 0;
    std::uint64_t written_bytes = 0;
    std::uint64_t staged_bytes = 0;
    std::uint64_t direct_bytes = 0;
    std::uint64_t hurried_bytes = 0; // of the staged ones: because an update was about to come
    bool is_partial = false;         // as its file is
    std::size_t reading = 0;         // chunks whose live memory is being read
    std::optional<Failure> failure;
    std::atomic<bool> is_dropped{false}; // set together with `failure`; read without the lock
    std::optional<Clock::time_point> captured_at;
    std::optional<Clock::time_point> durable_at;
    Clock::time_point progress_at = Clock::now();

    // Nobody reads the live memory any more.
    bool is_released() const { return reading == 0 && (captured_at || failure); }
    // Nothing more will come.
    bool is_settled() const { return durable_at || failure; }
};

// A job's numbers at one moment.
struct JobState {
    std::uint64_t total_bytes, captured_bytes, written_bytes, staged_bytes, direct_bytes,
        hurried_bytes;
    std::size_t captured_chunks; // of the first file
    bool is_captured, is_released, is_durable;
    std::optional<Failure> failure;
    std::optional<double> capture_end_s, durable_end_s;
    double idle_s;
};

} // namespace lowtide::checkpoint
