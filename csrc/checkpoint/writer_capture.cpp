// The writer's first half: from live memory into slabs.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "writer.hpp"

namespace lowtide::checkpoint {

void Writer::touch_loop() {
    for (std::size_t number = 0; number < ring_.slabs(); ++number) {
        ring_.touch(number);
        const Lock lock(mutex_);
        if (is_stopping_) {
            return;
        }
        ring_.give(static_cast<int>(number));
        ++touched_slabs_;
        capture_changed_.notify_all();
    }
}

void Writer::capture_loop() {
    Lock lock(mutex_);
    while (!is_stopping_) {
        if (std::unique_ptr<Chunk> chunk = take_chunk()) {
            capture_chunk(lock, std::move(chunk));
        } else {
            capture_changed_.wait(lock);
        }
    }
}

// Where the bytes of a job are that lie in `memory`, in that order.
std::vector<Writer::Urgent> Writer::urgent_of(const std::shared_ptr<Job> &job,
                                              const std::vector<Stretch> &memory) {
    std::vector<std::pair<File *, std::shared_ptr<const FileSpec>>> files;
    {
        const Lock lock(mutex_);
        if (job->is_released()) {
            return {};
        }
        for (const auto &file : job->files) {
            files.emplace_back(file.get(), file->spec);
        }
    }
    std::vector<Urgent> urgent;
    for (const Stretch &each : memory) {
        for (const auto &[file, spec] : files) {
            for (const std::size_t index : spec->chunks_of(each, options_.chunk_bytes)) {
                urgent.push_back({job, file, index});
            }
        }
    }
    return urgent;
}

// The next chunk to be captured, with a slab to capture it into or from where it lies; nullptr if
// there is none now.
std::unique_ptr<Chunk> Writer::take_chunk() {
    if (std::unique_ptr<Chunk> chunk = take_urgent()) {
        return chunk;
    }
    if (!urgent_.empty() && may_open(*urgent_.front().file)) {
        return nullptr; // it waits for a slab, which nobody else may take
    }
    while (!to_capture_.empty()) {
        const std::shared_ptr<Job> job = to_capture_.front();
        if (job->is_dropped || job->next_file == job->files.size()) {
            to_capture_.pop_front();
            continue;
        }
        File &file = *job->files[job->next_file];
        const std::size_t index = file.first_untaken();
        if (index == file.chunks && index > 0 && !file.is_partial) {
            ++job->next_file;
            continue;
        }
        if (!may_open(file)) {
            // What was opened out of turn must be able to close, and needs slabs for that.
            if (const std::optional<Urgent> other = untaken_of_open()) {
                return make_chunk(other->job, *other->file, other->index, false);
            }
        }
        ask_to_open(job, file);
        if (index == file.chunks) {
            if (file.is_partial) {
                return nullptr;
            }
            ++job->next_file;
            continue;
        }
        return make_chunk(job, file, index, false);
    }
    return nullptr;
}

std::unique_ptr<Chunk> Writer::take_urgent() {
    while (!urgent_.empty()) {
        const Urgent &first = urgent_.front();
        File &file = *first.file;
        // Of a partial file the last chunk may be one that is not known yet.
        if (first.job->is_dropped || first.index >= file.chunks ||
            file.stages[first.index] != File::Stage::known) {
            urgent_.pop_front();
            continue;
        }
        if (!may_open(file)) { // chunks of others must come first, so they may need all slabs
            return nullptr;
        }
        ask_to_open(first.job, file);
        std::unique_ptr<Chunk> chunk = make_chunk(first.job, file, first.index, true);
        if (chunk != nullptr) {
            urgent_.pop_front();
        }
        return chunk;
    }
    return nullptr;
}

// Whether the file is open, or will be without any other one being closed.
bool Writer::may_open(const File &file) const {
    return file.state != File::State::closed || open_files_ + to_open_.size() < most_open_files;
}

// A chunk of a file that is open, or will be.
std::optional<Writer::Urgent> Writer::untaken_of_open() const {
    for (const auto &job : active_) {
        for (const auto &file : job->files) {
            const bool is_open =
                file->state == File::State::open || file->state == File::State::opening;
            if (is_open && file->first_untaken() < file->chunks) {
                return Urgent{job, file.get(), file->next};
            }
        }
    }
    return std::nullopt;
}

void Writer::ask_to_open(const std::shared_ptr<Job> &job, File &file) {
    if (file.state == File::State::closed) {
        file.state = File::State::opening;
        to_open_.push_back({job, &file});
        files_changed_.notify_all();
    }
}

// The memory of a chunk if it can be written from there now; otherwise nullptr.
const unsigned char *Writer::source_in_place(const File &file, std::uint64_t begin,
                                             std::size_t payload) const {
    // At a given rate two are enough to keep to it, and no update has to wait for more.
    const int depth =
        options_.bytes_per_s > 0 ? std::min(2, options_.queue_depth) : options_.queue_depth;
    const bool is_free = file.state == File::State::open && file.is_direct &&
                         direct_in_flight_ < static_cast<std::size_t>(depth);
    return is_free ? direct_source(*file.spec, begin, payload) : nullptr;
}

std::unique_ptr<Chunk> Writer::make_chunk(const std::shared_ptr<Job> &job, File &file,
                                          std::size_t index, bool is_urgent) {
    const std::uint64_t begin = file.chunk_begin(index, options_.chunk_bytes);
    const auto payload = static_cast<std::size_t>(
        std::min<std::uint64_t>(options_.chunk_bytes, file.spec->size - begin));
    const unsigned char *data = nullptr;
    const int slab = ring_.take();
    if (slab != SlabRing::none) {
        data = ring_.slab(slab).data();
    } else {
        data = source_in_place(file, begin, payload);
    }
    if (data == nullptr) {
        return nullptr;
    }
    auto chunk = std::make_unique<Chunk>();
    chunk->job = job;
    chunk->file = &file;
    chunk->spec = file.spec;
    chunk->index = index;
    chunk->payload = payload;
    chunk->slab = slab;
    chunk->is_hurried = is_urgent;
    chunk->data = data;
    chunk->offset = begin;
    chunk->is_dropped = &job->is_dropped;
    file.stages[index] = File::Stage::taken;
    ++file.in_flight;
    ++job->reading;
    direct_in_flight_ += slab == SlabRing::none ? 1 : 0;
    return chunk;
}

void Writer::capture_chunk(Lock &lock, std::unique_ptr<Chunk> chunk) {
    File &file = *chunk->file;
    const std::shared_ptr<Job> job = chunk->job;
    const std::shared_ptr<const FileSpec> spec = chunk->spec;
    ++capturing_;
    lock.unlock();
    bool has_memory = true;
    try {
        if (chunk->slab == SlabRing::none) {
            capture_in_place(*spec, chunk->offset, ConstBytes(chunk->data, chunk->payload),
                             chunk->parts);
        } else {
            const Bytes slab = ring_.slab(chunk->slab);
            capture(*spec, chunk->offset, slab.first(chunk->payload), chunk->parts);
            // Direct I/O writes whole pages; what stands behind the end is cut off later.
            const Bytes rest = slab.drop(chunk->payload);
            std::memset(rest.data(), 0, std::min(rest.size(), page_bytes));
        }
    } catch (const std::bad_alloc &) {
        has_memory = false;
    }
    lock.lock();
    if (chunk->slab != SlabRing::none) {
        count_captured(*job, *chunk);
    }
    if (!has_memory) {
        fail(*job, {"capture", spec->path, ENOMEM, spec->size});
    }
    file.captured.push_back(std::move(chunk));
    fold_captured(lock, file);
    if (--capturing_ == 0 && is_stopping_) {
        ended_.notify_all();
    }
}

void Writer::count_captured(Job &job, const Chunk &chunk) {
    --job.reading;
    if (!job.is_dropped) {
        (chunk.slab == SlabRing::none ? job.direct_bytes : job.staged_bytes) += chunk.payload;
        job.hurried_bytes += chunk.slab != SlabRing::none && chunk.is_hurried ? chunk.payload : 0;
        job.captured_bytes += chunk.payload;
        File &file = *chunk.file;
        file.stages[chunk.index] = File::Stage::captured;
        while (file.captured_chunks < file.chunks &&
               file.stages[file.captured_chunks] == File::Stage::captured) {
            ++file.captured_chunks;
        }
        job.progress_at = Clock::now();
        if (job.captured_bytes == job.total_bytes && !job.is_partial) {
            job.captured_at = job.progress_at;
        }
    }
    capture_changed_.notify_all(); // somebody may wait for this one, or for the whole job
}

// Adds what captured chunks tell about checksums and hands them on. One thread at a time does it
// for a file, also for those that others capture meanwhile.
void Writer::fold_captured(Lock &lock, File &file) {
    if (file.is_folding) {
        return;
    }
    file.is_folding = true;
    while (!file.captured.empty()) {
        std::unique_ptr<Chunk> chunk = std::move(file.captured.front());
        file.captured.pop_front();
        fold_one(lock, file, std::move(chunk));
    }
    file.is_folding = false;
}

void Writer::fold_one(Lock &lock, File &file, std::unique_ptr<Chunk> chunk) {
    const std::shared_ptr<Job> job = chunk->job;
    lock.unlock();
    for (const Part &part : chunk->parts) {
        if (part.kind == Part::Kind::entry) {
            file.sums.add(part);
        }
    }
    Open now{nullptr, chunk->spec, std::move(chunk->parts), chunk->index};
    now.chunk = std::move(chunk);
    file.open.push_back(std::move(now));
    // Mostly it is this one alone. Others have waited for what it has.
    std::vector<Open> still_open, done;
    std::vector<LateBytes> late;
    for (Open &each : file.open) {
        const bool has_slab = each.chunk != nullptr && each.chunk->slab != SlabRing::none;
        const Bytes slab = has_slab ? ring_.slab(each.chunk->slab) : Bytes();
        const std::uint64_t begin = file.chunk_begin(each.index, options_.chunk_bytes);
        const bool is_done = fill_in(*each.spec, each.parts, file.sums, slab, begin, late);
        (is_done ? done : still_open).push_back(std::move(each));
    }
    std::vector<std::uint32_t> crcs;
    for (const Open &each : done) {
        crcs.push_back(chunk_crc(each.parts));
    }
    lock.lock();
    file.late.insert(file.late.end(), late.begin(), late.end());
    for (std::size_t i = 0; i < done.size(); ++i) {
        file.chunk_crcs[done[i].index] = crcs[i];
        if (done[i].chunk != nullptr) {
            dispatch(std::move(done[i].chunk));
        }
    }
    for (Open &each : still_open) {
        if (each.chunk != nullptr && (job->is_dropped || !will_complete(file, each))) {
            dispatch(std::move(each.chunk));
        }
    }
    file.open = std::move(still_open);
}

// Whether threads have all chunks that the open patches wait for: then they need no more slabs.
bool Writer::will_complete(const File &file, const Open &open) const {
    return std::all_of(open.parts.begin(), open.parts.end(), [&](const Part &part) {
        if (part.kind != Part::Kind::patch || open.spec->entry_bytes[part.entry] == 0) {
            return true;
        }
        const std::uint64_t begin = open.spec->entry_begins[part.entry];
        const std::uint64_t last = open.spec->entry_ends[part.entry] - 1;
        return file.are_taken(static_cast<std::size_t>(begin / options_.chunk_bytes),
                              static_cast<std::size_t>(last / options_.chunk_bytes));
    });
}

} // namespace lowtide::checkpoint
