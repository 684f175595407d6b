#include "writer.hpp"

#include <csignal>
#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <utility>

namespace lowtide::checkpoint {
namespace {

constexpr int closers = 2;                         // one slow sync does not hold up all others
constexpr std::chrono::milliseconds grace{2000};   // for threads to end, if nothing hangs
constexpr double longest_wait_s = 365.0 * 86400.0; // larger ones overflow the clock

Clock::time_point after(double seconds) {
    const double bounded = std::min(seconds < 0 ? longest_wait_s : seconds, longest_wait_s);
    return Clock::now() +
           std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

double seconds(Clock::time_point time) {
    return std::chrono::duration<double>(time.time_since_epoch()).count();
}

void check(const WriterOptions &options) {
    if (options.io != "auto" && options.io != "io_uring" && options.io != "threads") {
        throw std::invalid_argument("io: got \"" + options.io +
                                    "\", allowed is \"auto\", \"io_uring\" or \"threads\"");
    }
    if (options.queue_depth < 1 || options.queue_depth > 256) {
        throw std::invalid_argument("queue_depth: got " + std::to_string(options.queue_depth) +
                                    ", allowed is 1 to 256");
    }
    if (!(options.bytes_per_s >= 0)) {
        throw std::invalid_argument("bytes_per_s: got " + std::to_string(options.bytes_per_s) +
                                    ", allowed is 0 (no limit) and more");
    }
}

// The process's handlers belong to its own threads; an interrupted write here helps nobody.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

} // namespace

std::shared_ptr<Writer> Writer::open(const WriterOptions &options) {
    check(options);
    const std::shared_ptr<Writer> writer(new Writer(options));
    try {
        writer->start();
    } catch (...) {
        writer->close(0); // ends the threads that did start
        throw;
    }
    return writer;
}

Writer::Writer(const WriterOptions &options)
    : options_(options), ring_(options.buffer_bytes, options.chunk_bytes),
      is_direct_(options.use_direct),
      direct_reason_(options.use_direct ? "" : "switched off by the caller") {
    // The back end's threads hold the writer alive, so `this` outlives every call.
    const Written written = [this](Write &write, int error) {
        on_written(static_cast<Chunk &>(write), error);
    };
    // Through the page cache io_uring has nothing to offer: the kernel copies in its own threads.
    if (options.io == "io_uring" || (options.io == "auto" && options.use_direct)) {
        io_ = make_uring_io(options.queue_depth, written, io_reason_);
    } else {
        io_reason_ =
            options.io == "threads" ? "switched off by the caller" : "of no use without direct I/O";
    }
    if (io_ == nullptr) {
        io_ = make_thread_io(std::min(options.queue_depth, 8), written);
    }
    io_name_ = io_->name();
}

void Writer::start() {
    const SignalsBlocked blocked;
    spawn([this] { touch_loop(); });
    spawn([this] { capture_loop(); });
    spawn([this] { open_loop(); });
    for (int i = 0; i < closers; ++i) {
        spawn([this] { close_loop(); });
    }
    for (int i = 0; i < io_->threads(); ++i) {
        spawn([this] { io_->run(); });
    }
    if (options_.bytes_per_s > 0) {
        spawn([this] { pace_loop(); });
    }
}

void Writer::spawn(std::function<void()> work) {
    const Lock lock(mutex_);
    workers_.push_back(std::make_unique<Worker>());
    Worker &worker = *workers_.back();
    worker.has_ended = true; // unless the thread starts
    worker.thread = std::thread([self = shared_from_this(), &worker, work = std::move(work)] {
        std::string what;
        try {
            work();
        } catch (const std::exception &error) { // memory is gone: give up all jobs, not the process
            what = error.what();
        }
        const Lock inner(self->mutex_);
        if (!what.empty()) {
            self->is_closing_ = true;
            const auto jobs = self->active_;
            for (const auto &job : jobs) {
                self->fail(*job, {"run a thread (" + what + ") for", "", ENOMEM, 0});
            }
        }
        worker.has_ended = true;
        self->ended_.notify_all();
    });
    worker.has_ended = false;
}

std::shared_ptr<Job> Writer::submit(std::vector<FileSpec> specs, bool is_partial) {
    auto job = std::make_shared<Job>();
    job->is_partial = is_partial;
    for (FileSpec &spec : specs) {
        auto file = std::make_unique<File>();
        file->is_partial = is_partial;
        set_spec(*job, *file, std::make_shared<const FileSpec>(std::move(spec)));
        job->files.push_back(std::move(file));
    }
    const Lock lock(mutex_);
    if (is_closing_) {
        throw std::runtime_error("the writer is closed");
    }
    active_.push_back(job);
    to_capture_.push_back(job);
    if (job->total_bytes == 0 && !is_partial) {
        job->captured_at = Clock::now();
    }
    if (job->files.empty()) {
        job->durable_at = Clock::now();
        active_.pop_back();
    }
    capture_changed_.notify_all();
    return job;
}

void Writer::set_spec(Job &job, File &file, std::shared_ptr<const FileSpec> spec) const {
    job.total_bytes += spec->size - (file.spec == nullptr ? 0 : file.spec->size);
    file.spec = std::move(spec);
    // Of a partial file the chunk in which it ends is left for later.
    const std::uint64_t last = file.is_partial ? 0 : options_.chunk_bytes - 1;
    file.chunks = static_cast<std::size_t>((file.spec->size + last) / options_.chunk_bytes);
    file.chunk_crcs.resize(file.chunks);
    file.stages.resize(file.chunks);
}

void Writer::extend(const std::shared_ptr<Job> &job, FileSpec spec, bool is_partial) {
    auto longer = std::make_shared<const FileSpec>(std::move(spec));
    const Lock lock(mutex_);
    if (!job->is_partial) {
        throw std::invalid_argument("plan of " + longer->path +
                                    ": the job's file is whole already");
    }
    File &file = *job->files.front();
    longer->check_begins_with(*file.spec);
    job->is_partial = file.is_partial = is_partial;
    set_spec(*job, file, std::move(longer));
    ask_for_more(job, file);
    close_if_idle(job, file);
    if (job->captured_bytes == job->total_bytes && !is_partial && !job->is_dropped) {
        job->captured_at = Clock::now();
    }
    job->progress_at = Clock::now();
    capture_changed_.notify_all();
}

void Writer::hurry(const std::shared_ptr<Job> &job, const std::vector<Stretch> &memory) {
    const std::vector<Urgent> urgent = urgent_of(job, memory);
    const Lock lock(mutex_);
    urgent_.insert(urgent_.end(), urgent.begin(), urgent.end());
    capture_changed_.notify_all();
}

bool Writer::wait_released(const std::shared_ptr<Job> &job, const std::vector<Stretch> &memory,
                           double timeout_s) {
    const std::vector<Urgent> urgent = urgent_of(job, memory);
    Lock lock(mutex_);
    urgent_.insert(urgent_.begin(), urgent.begin(), urgent.end());
    capture_changed_.notify_all();
    std::size_t done = 0;
    return wait_until(lock, timeout_s, [&] {
        const auto is_captured = [](const Urgent &each) {
            return each.index < each.file->chunks &&
                   each.file->stages[each.index] == File::Stage::captured;
        };
        while (done < urgent.size() && is_captured(urgent[done])) {
            ++done;
        }
        return done == urgent.size() || job->is_released();
    });
}

bool Writer::wait_captured(const std::shared_ptr<Job> &job, double timeout_s) {
    Lock lock(mutex_);
    return wait_until(lock, timeout_s, [&job] { return job->is_released(); });
}

// Helps to capture until `is_over`, which is called under the lock.
bool Writer::wait_until(Lock &lock, double timeout_s, const std::function<bool()> &is_over) {
    const Clock::time_point deadline = after(timeout_s);
    while (!is_over()) {
        if (Clock::now() >= deadline) {
            return false;
        }
        if (std::unique_ptr<Chunk> chunk = is_stopping_ ? nullptr : take_chunk()) {
            capture_chunk(lock, std::move(chunk));
        } else {
            capture_changed_.wait_until(lock, deadline);
        }
    }
    return true;
}

bool Writer::wait_settled(const Job &job, double timeout_s) {
    Lock lock(mutex_);
    return settled_.wait_until(lock, after(timeout_s), [&job] { return job.is_settled(); });
}

void Writer::cancel(Job &job) {
    const Lock lock(mutex_);
    fail(job, {"cancelled", "", ECANCELED, 0});
}

JobState Writer::state(const Job &job) {
    const Lock lock(mutex_);
    JobState state{};
    state.total_bytes = job.total_bytes;
    state.captured_bytes = job.captured_bytes;
    state.written_bytes = job.written_bytes;
    state.staged_bytes = job.staged_bytes;
    state.direct_bytes = job.direct_bytes;
    state.hurried_bytes = job.hurried_bytes;
    state.captured_chunks = job.files.empty() ? 0 : job.files.front()->captured_chunks;
    state.is_captured = job.captured_at.has_value();
    state.is_released = job.is_released();
    state.is_durable = job.durable_at.has_value();
    state.failure = job.failure;
    if (job.captured_at) {
        state.capture_end_s = seconds(*job.captured_at);
    }
    if (job.durable_at) {
        state.durable_end_s = seconds(*job.durable_at);
    }
    state.idle_s = job.is_settled() ? 0 : seconds(Clock::now()) - seconds(job.progress_at);
    return state;
}

std::vector<std::vector<std::uint32_t>> Writer::results(const Job &job) {
    const Lock lock(mutex_);
    if (!job.durable_at) {
        throw std::runtime_error("the job is not durable");
    }
    std::vector<std::vector<std::uint32_t>> results;
    for (const auto &file : job.files) {
        results.push_back(file->chunk_crcs);
    }
    return results;
}

WriterFacts Writer::facts() {
    const Lock lock(mutex_);
    return {io_name_,
            io_reason_,
            is_direct_,
            direct_reason_,
            options_.buffer_bytes,
            touched_slabs_ * options_.chunk_bytes,
            options_.chunk_bytes};
}

bool Writer::close(double deadline_s) {
    Lock lock(mutex_);
    is_closing_ = true;
    settled_.wait_until(lock, after(std::max(deadline_s, 0.0)), [this] { return active_.empty(); });
    const std::vector<std::shared_ptr<Job>> late = active_;
    for (const auto &job : late) {
        fail(*job, {"cancelled", "", ECANCELED, 0});
    }
    is_stopping_ = true;
    for (auto *each : {&capture_changed_, &files_changed_, &pace_changed_}) {
        each->notify_all();
    }
    if (io_ != nullptr) {
        io_->stop();
    }
    const auto has_ended = [](const std::unique_ptr<Worker> &each) { return each->has_ended; };
    const bool is_clean = ended_.wait_for(lock, grace, [this, has_ended] {
        return capturing_ == 0 && std::all_of(workers_.begin(), workers_.end(), has_ended);
    });
    for (const auto &worker : workers_) {
        std::thread thread = std::move(worker->thread);
        if (!thread.joinable()) {
            continue;
        }
        if (worker->has_ended) {
            lock.unlock();
            thread.join();
            lock.lock();
        } else {
            thread.detach();
        }
    }
    if (is_clean) { // tickets may live on for long; the buffer must not
        io_.reset();
        ring_.unmap();
    }
    return is_clean;
}

} // namespace lowtide::checkpoint
