// Captures jobs into the slab ring and brings their files to the disk, all in its own threads.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io.hpp"
#include "job.hpp"
#include "slab_ring.hpp"

namespace lowtide::checkpoint {

struct WriterOptions {
    std::size_t buffer_bytes = 0;
    std::size_t chunk_bytes = 0;
    std::string io = "auto"; // or "io_uring" or "threads"
    bool use_direct = true;
    int queue_depth = 8;
    double bytes_per_s = 0; // 0: as fast as it goes
};

struct WriterFacts {
    std::string io;
    std::string io_reason; // why not io_uring, if it is not
    bool is_direct;        // as last seen
    std::string direct_reason;
    std::size_t buffer_bytes, touched_bytes, chunk_bytes;
};

// How it works. Three kinds of threads hand chunks on:
//  - capture: takes the next chunk of the oldest job and a slab, copies, computes checksums;
//    whoever waits for a capture helps. What an update is about to overwrite comes first, so chunks
//    may come in any order (see capture.hpp). A chunk that waits for others waits only for such
//    that a thread has already, and never keeps a slab from those; otherwise its patches are
//    written late.
//  - I/O: the back end's; a chunk's slab is free again once it is written.
//  - files: one thread opens, others sync and close, since a slow disk may hold them for long.
// One lock guards all state; it is never held while memory is copied or a file is touched.
// Threads hold the writer alive, so one that hangs in the kernel can be left behind.
class Writer : public std::enable_shared_from_this<Writer> {
  public:
    // Throws std::invalid_argument and std::system_error.
    static std::shared_ptr<Writer> open(const WriterOptions &options);
    ~Writer() = default;

    // Takes prepared specs. If `is_partial`, there is one, the file's beginning; the job waits for
    // the rest, for extend(). Throws std::runtime_error after close().
    std::shared_ptr<Job> submit(std::vector<FileSpec> specs, bool is_partial = false);

    // Takes more of such a file, or all of it. Throws std::invalid_argument where its beginning is
    // not what was submitted.
    void extend(const std::shared_ptr<Job> &job, FileSpec spec, bool is_partial);

    // Captures what lies in this memory before all else that is still to be captured, in this
    // order; returns at once.
    void hurry(const std::shared_ptr<Job> &job, const std::vector<Stretch> &memory);

    // Does the same before what was hurried until now, and waits until nobody reads it any more,
    // helping meanwhile. Returns false when the time is over first.
    bool wait_released(const std::shared_ptr<Job> &job, const std::vector<Stretch> &memory,
                       double timeout_s);

    // Waits until the job's live memory is not read any more, helping meanwhile. Returns false
    // when the time is over first. A negative time-out waits for ever.
    bool wait_captured(const std::shared_ptr<Job> &job, double timeout_s);

    // Waits until the job is durable or has failed; returns false when the time is over first.
    bool wait_settled(const Job &job, double timeout_s);

    void cancel(Job &job);
    JobState state(const Job &job);
    std::vector<std::vector<std::uint32_t>> results(const Job &job);
    WriterFacts facts();

    // Lets jobs finish for `deadline_s`, cancels the others and ends the threads. Returns whether
    // everything ended; a thread that hangs in the kernel is left behind with its memory.
    bool close(double deadline_s);

  private:
    using Lock = std::unique_lock<std::mutex>;

    static constexpr std::size_t most_open_files = 64;

    explicit Writer(const WriterOptions &options);
    void start();
    void set_spec(Job &job, File &file, std::shared_ptr<const FileSpec> spec) const;
    void spawn(std::function<void()> work);

    // writer_capture.cpp
    void capture_loop();
    void touch_loop();
    struct Urgent {
        std::shared_ptr<Job> job;
        File *file;
        std::size_t index;
    };
    std::vector<Urgent> urgent_of(const std::shared_ptr<Job> &job,
                                  const std::vector<Stretch> &memory);
    bool wait_until(Lock &lock, double timeout_s, const std::function<bool()> &is_over);
    std::unique_ptr<Chunk> take_chunk();
    std::unique_ptr<Chunk> take_urgent();
    std::unique_ptr<Chunk> make_chunk(const std::shared_ptr<Job> &job, File &file,
                                      std::size_t index, bool is_urgent);
    const unsigned char *source_in_place(const File &file, std::uint64_t begin,
                                         std::size_t payload) const;
    bool may_open(const File &file) const;
    std::optional<Urgent> untaken_of_open() const;
    void ask_to_open(const std::shared_ptr<Job> &job, File &file);
    void capture_chunk(Lock &lock, std::unique_ptr<Chunk> chunk);
    void fold_captured(Lock &lock, File &file);
    void fold_one(Lock &lock, File &file, std::unique_ptr<Chunk> chunk);
    bool will_complete(const File &file, const Open &open) const;
    void count_captured(Job &job, const Chunk &chunk);

    // writer_files.cpp
    void open_loop();
    void close_loop();
    void pace_loop();
    void open_file(Lock &lock, const std::shared_ptr<Job> &job, File &file);
    void reserve_more(Lock &lock, const std::shared_ptr<Job> &job, File &file);
    void ask_for_more(const std::shared_ptr<Job> &job, File &file);
    void finish_file(Lock &lock, const std::shared_ptr<Job> &job, File &file);
    void dispatch(std::unique_ptr<Chunk> chunk);
    void start_write(Chunk &chunk);
    void on_written(Chunk &chunk, int error);
    void retire(std::unique_ptr<Chunk> chunk);
    void close_if_idle(const std::shared_ptr<Job> &job, File &file);
    void fail(Job &job, Failure failure);

    struct FileTask {
        std::shared_ptr<Job> job;
        File *file;
    };

    const WriterOptions options_;
    SlabRing ring_;
    std::unique_ptr<Io> io_;
    std::string io_name_;
    std::string io_reason_;

    std::mutex mutex_; // guards everything below
    std::condition_variable capture_changed_;
    std::condition_variable files_changed_;
    std::condition_variable pace_changed_;
    std::condition_variable settled_;
    std::condition_variable ended_;
    std::deque<std::shared_ptr<Job>> to_capture_;
    std::deque<Urgent> urgent_;                // to be captured before them
    std::vector<std::shared_ptr<Job>> active_; // not settled
    std::deque<FileTask> to_open_;
    std::deque<FileTask> to_close_;
    std::deque<Chunk *> to_pace_;
    std::size_t open_files_ = 0;
    std::size_t direct_in_flight_ = 0;
    std::size_t capturing_ = 0; // chunks in capture_chunk, in whichever thread
    std::size_t touched_slabs_ = 0;
    bool is_direct_;
    std::string direct_reason_;
    bool is_closing_ = false;  // no new jobs
    bool is_stopping_ = false; // threads end

    struct Worker {
        std::thread thread;
        bool has_ended = false;
    };
    std::vector<std::unique_ptr<Worker>> workers_;
};

} // namespace lowtide::checkpoint
