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

// The next chunk of the oldest job, with a slab to capture it into; nullptr if there is none now.
std::unique_ptr<Chunk> Writer::take_chunk() {
    while (!to_capture_.empty()) {
        const std::shared_ptr<Job> job = to_capture_.front();
        if (job->is_dropped || job->next_file == job->files.size()) {
            to_capture_.pop_front();
            continue;
        }
        File &file = *job->files[job->next_file];
        if (file.state == File::State::closed) {
            file.state = File::State::opening;
            to_open_.push_back({job, &file});
            files_changed_.notify_all();
        }
        if (file.taken == file.chunks) {
            if (file.is_partial) {
                return nullptr;
            }
            ++job->next_file;
            continue;
        }
        return make_chunk(job, file);
    }
    return nullptr;
}

std::unique_ptr<Chunk> Writer::make_chunk(const std::shared_ptr<Job> &job, File &file) {
    const std::uint64_t begin = file.chunk_begin(file.taken, options_.chunk_bytes);
    const auto payload = static_cast<std::size_t>(
        std::min<std::uint64_t>(options_.chunk_bytes, file.spec->size - begin));
    const int slab = ring_.take();
    const unsigned char *data = nullptr;
    if (slab != SlabRing::none) {
        data = ring_.slab(slab).data();
    } else if (file.state == File::State::open && file.is_direct &&
               direct_in_flight_ < static_cast<std::size_t>(options_.queue_depth)) {
        data = direct_source(*file.spec, begin, payload);
    }
    if (data == nullptr) {
        return nullptr;
    }
    auto chunk = std::make_unique<Chunk>();
    chunk->job = job;
    chunk->file = &file;
    chunk->spec = file.spec;
    chunk->index = file.taken++;
    chunk->payload = payload;
    chunk->slab = slab;
    chunk->data = data;
    chunk->offset = begin;
    chunk->is_dropped = &job->is_dropped;
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
    const std::size_t index = chunk->index;
    file.captured.emplace(index, std::move(chunk));
    fold_captured(lock, file);
    if (--capturing_ == 0 && is_stopping_) {
        ended_.notify_all();
    }
}

void Writer::count_captured(Job &job, const Chunk &chunk) {
    --job.reading;
    if (!job.is_dropped) {
        (chunk.slab == SlabRing::none ? job.direct_bytes : job.staged_bytes) += chunk.payload;
        job.captured_bytes += chunk.payload;
        chunk.file->captured_behind.insert(chunk.index);
        while (chunk.file->captured_behind.erase(chunk.file->captured_chunks) != 0) {
            ++chunk.file->captured_chunks;
        }
        job.progress_at = Clock::now();
        if (job.captured_bytes == job.total_bytes && !job.is_partial) {
            job.captured_at = job.progress_at;
        }
    }
    if (job.is_released()) {
        capture_changed_.notify_all();
    }
}

// Completes the checksums of captured chunks in file order and hands them on. The thread that
// captures a chunk all others wait for folds theirs too.
void Writer::fold_captured(Lock &lock, File &file) {
    if (file.is_folding) {
        return;
    }
    file.is_folding = true;
    for (auto next = file.captured.find(file.folded); next != file.captured.end();
         next = file.captured.find(file.folded)) {
        std::unique_ptr<Chunk> chunk = std::move(next->second);
        file.captured.erase(next);
        if (file.entry_crcs.size() < chunk->spec->entry_count) {
            file.entry_crcs.resize(chunk->spec->entry_count);
        }
        lock.unlock();
        const Bytes slab = chunk->slab == SlabRing::none ? Bytes() : ring_.slab(chunk->slab);
        const std::uint32_t crc = fold(chunk->parts, file.entry_crcs, slab);
        lock.lock();
        file.chunk_crcs[chunk->index] = crc;
        ++file.folded;
        dispatch(std::move(chunk));
    }
    file.is_folding = false;
}

} // namespace lowtide::checkpoint
