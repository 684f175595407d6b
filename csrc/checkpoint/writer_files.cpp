// The writer's second half: from slabs to the disk.
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "file_calls.hpp"
#include "writer.hpp"

namespace lowtide::checkpoint {
namespace {

std::size_t whole_pages(std::size_t bytes) {
    return (bytes + page_bytes - 1) / page_bytes * page_bytes;
}

} // namespace

void Writer::open_loop() {
    Lock lock(mutex_);
    for (;;) {
        files_changed_.wait(lock, [this] {
            return is_stopping_ ||
                   (!to_open_.empty() && (open_files_ < most_open_files ||
                                          to_open_.front().file->state == File::State::open));
        });
        if (to_open_.empty()) {
            return;
        }
        const FileTask task = to_open_.front();
        to_open_.pop_front();
        if (task.file->state == File::State::open) {
            reserve_more(lock, task.job, *task.file);
        } else {
            open_file(lock, task.job, *task.file);
        }
    }
}

// A partial file has grown. Writes beyond what is reserved would have to wait for each other.
void Writer::ask_for_more(const std::shared_ptr<Job> &job, File &file) {
    if (file.state == File::State::open && file.is_partial && !file.is_reserving &&
        !job->is_dropped && file.spec->size > file.reserved) {
        file.is_reserving = true;
        to_open_.push_front({job, &file}); // before what waits until other files are closed
        files_changed_.notify_all();
    }
}

void Writer::reserve_more(Lock &lock, const std::shared_ptr<Job> &job, File &file) {
    const std::shared_ptr<const FileSpec> spec = file.spec;
    const int fd = file.fd;
    int error = 0;
    if (!job->is_dropped) {
        lock.unlock();
        error = reserve_bytes(fd, spec->size); // and no guess: writes are under way
        lock.lock();
    }
    file.reserved = spec->size;
    file.is_reserving = false;
    if (error != 0) {
        fail(*job, {"reserve space for", spec->path, error, spec->size});
    }
    ask_for_more(job, file);
    close_if_idle(job, file);
    files_changed_.notify_all(); // the closing threads end once nothing is left to do here
}

void Writer::open_file(Lock &lock, const std::shared_ptr<Job> &job, File &file) {
    if (job->is_dropped) {
        file.state = File::State::done;
        files_changed_.notify_all(); // the closing threads end once nothing is left to open
        return;
    }
    ++open_files_;
    bool use_direct = options_.use_direct;
    const std::shared_ptr<const FileSpec> spec = file.spec;
    const bool may_guess = file.is_partial && spec->expected > spec->size;
    lock.unlock();
    const char *operation = "open";
    const int fd = open_for_writing(spec->path, use_direct);
    int error = fd < 0 ? errno : 0;
    std::uint64_t reserved = spec->size;
    if (error == 0) {
        operation = "reserve space for";
        if (may_guess && !reserve_guess(fd, spec->expected, reserved)) {
            error = errno;
        } else if (reserved == spec->size) {
            error = reserve_bytes(fd, reserved);
        }
    }
    lock.lock();
    file.fd = fd;
    file.is_direct = use_direct;
    if (fd < 0) {
        file.state = File::State::done;
        --open_files_;
        files_changed_.notify_all();
    } else {
        file.state = File::State::open;
        file.reserved = reserved;
        file.has_guessed = may_guess;
    }
    if (options_.use_direct && error == 0) {
        is_direct_ = use_direct;
        direct_reason_ = use_direct ? "" : "the file system refuses O_DIRECT";
    }
    if (error != 0) {
        fail(*job, {operation, file.spec->path, error, file.spec->size});
    }
    std::vector<std::unique_ptr<Chunk>> waiting = std::move(file.unopened);
    for (auto &chunk : waiting) {
        dispatch(std::move(chunk));
    }
    ask_for_more(job, file);
    close_if_idle(job, file);
    capture_changed_.notify_all(); // the direct lane waits for the file
}

// Sends a folded chunk on its way, or ends it if its job failed.
void Writer::dispatch(std::unique_ptr<Chunk> chunk) {
    File &file = *chunk->file;
    if (chunk->job->is_dropped) {
        retire(std::move(chunk));
    } else if (file.state != File::State::open) {
        file.unopened.push_back(std::move(chunk));
    } else if (options_.bytes_per_s > 0) {
        to_pace_.push_back(chunk.release());
        pace_changed_.notify_all();
    } else {
        start_write(*chunk.release());
    }
}

// The back end holds the chunk from here to on_written.
void Writer::start_write(Chunk &chunk) {
    File &file = *chunk.file;
    chunk.fd = file.fd;
    chunk.done = 0;
    chunk.fruitless = 0;
    chunk.is_direct = file.is_direct;
    chunk.bytes = file.is_direct ? whole_pages(chunk.payload) : chunk.payload;
    file.is_padded |= chunk.bytes != chunk.payload;
    io_->submit(chunk);
}

// Lets a write begin when, at the allowed rate, it would already have ended: so the rate is never
// exceeded, however small the job.
void Writer::pace_loop() {
    Lock lock(mutex_);
    Clock::time_point free_at = Clock::now();
    for (;;) {
        pace_changed_.wait(lock, [this] { return is_stopping_ || !to_pace_.empty(); });
        if (to_pace_.empty()) {
            return;
        }
        const std::shared_ptr<Job> job = to_pace_.front()->job;
        const double wait_s = static_cast<double>(to_pace_.front()->payload) / options_.bytes_per_s;
        const Clock::time_point due =
            std::max(Clock::now(), free_at) +
            std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(wait_s));
        pace_changed_.wait_until(lock, due, [&job] { return job->is_dropped.load(); });
        std::unique_ptr<Chunk> chunk(to_pace_.front());
        to_pace_.pop_front();
        if (job->is_dropped) {
            retire(std::move(chunk));
        } else {
            free_at = due;
            start_write(*chunk.release());
        }
    }
}

void Writer::on_written(Chunk &written, int error) {
    const Lock lock(mutex_);
    File &file = *written.file;
    if (error == EINVAL && written.is_direct && !written.job->is_dropped) {
        // Some file systems take O_DIRECT and refuse the first write.
        const int flags = fcntl(file.fd, F_GETFL);
        if (flags >= 0 && fcntl(file.fd, F_SETFL, flags & ~O_DIRECT) == 0) {
            file.is_direct = false;
            is_direct_ = false;
            direct_reason_ = "the file system refuses direct writes";
            start_write(written);
            return;
        }
    }
    std::unique_ptr<Chunk> chunk(&written);
    const std::shared_ptr<Job> job = chunk->job;
    if (error != 0) {
        fail(*job, {"write", file.spec->path, error, file.spec->size});
    } else {
        ++file.written;
        job->written_bytes += chunk->payload;
        job->progress_at = Clock::now();
    }
    retire(std::move(chunk));
}

// Ends a chunk, written or not: its slab is free again.
void Writer::retire(std::unique_ptr<Chunk> chunk) {
    const std::shared_ptr<Job> job = chunk->job;
    File &file = *chunk->file;
    if (chunk->slab == SlabRing::none) {
        --direct_in_flight_;
        count_captured(*job, *chunk);
    } else {
        ring_.give(chunk->slab);
    }
    --file.in_flight;
    chunk.reset();
    capture_changed_.notify_all();
    close_if_idle(job, file);
}

void Writer::close_if_idle(const std::shared_ptr<Job> &job, File &file) {
    const bool is_written = file.written == file.chunks && !file.is_partial;
    const bool is_over = is_written || (job->is_dropped && file.in_flight == 0);
    if (file.state == File::State::open && is_over && !file.is_reserving) {
        file.state = File::State::closing;
        to_close_.push_back({job, &file});
        files_changed_.notify_all();
    }
}

void Writer::close_loop() {
    Lock lock(mutex_);
    for (;;) {
        files_changed_.wait(lock, [this] {
            const bool has_work = open_files_ > 0 || !to_open_.empty();
            return !to_close_.empty() || (is_stopping_ && !has_work);
        });
        if (to_close_.empty()) {
            return;
        }
        const FileTask task = to_close_.front();
        to_close_.pop_front();
        finish_file(lock, task.job, *task.file);
    }
}

void Writer::finish_file(Lock &lock, const std::shared_ptr<Job> &job, File &file) {
    const char *operation = nullptr;
    int error = 0;
    const auto attempt = [&](const char *name, int result) {
        if (result < 0 && operation == nullptr) {
            operation = name;
            error = errno;
        }
    };
    const auto size = static_cast<off_t>(file.spec->size);
    const bool is_longer = file.is_padded || file.has_guessed;
    const std::vector<LateBytes> late = std::move(file.late);
    lock.unlock();
    if (!job->is_dropped && !late.empty()) {
        const int written = write_late(file.fd, late);
        attempt("write", written);
    }
    if (!job->is_dropped && operation == nullptr && is_longer) {
        attempt("truncate", retried([&] { return ftruncate(file.fd, size); }));
    }
    if (!job->is_dropped && operation == nullptr) {
        // Never again after an error: the kernel has by then forgotten what it could not write.
        attempt("sync", fdatasync(file.fd));
    }
    attempt("close", ::close(file.fd));
    lock.lock();
    file.fd = -1;
    file.state = File::State::done;
    --open_files_;
    files_changed_.notify_all();
    if (job->is_dropped) {
        return;
    }
    if (operation != nullptr) {
        fail(*job, {operation, file.spec->path, error, file.spec->size});
        return;
    }
    job->progress_at = Clock::now();
    if (++job->durable_files == job->files.size()) {
        job->durable_at = job->progress_at;
        active_.erase(std::find(active_.begin(), active_.end(), job));
        settled_.notify_all();
    }
}

// Keeps the job's first failure and drops what is left of it. What is under way ends by itself.
void Writer::fail(Job &job, Failure failure) {
    if (job.is_settled()) {
        return;
    }
    job.failure = std::move(failure);
    job.is_dropped = true;
    const auto found = std::find_if(active_.begin(), active_.end(),
                                    [&job](const auto &each) { return each.get() == &job; });
    const std::shared_ptr<Job> self = *found;
    active_.erase(found);
    for (const auto &file : job.files) {
        std::vector<std::unique_ptr<Chunk>> waiting = std::move(file->unopened);
        for (auto &chunk : waiting) {
            retire(std::move(chunk));
        }
        close_if_idle(self, *file);
    }
    for (auto *each : {&capture_changed_, &files_changed_, &pace_changed_, &settled_}) {
        each->notify_all();
    }
}

} // namespace lowtide::checkpoint
