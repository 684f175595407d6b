// Writes byte ranges to files: one small interface, two back ends.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace lowtide::checkpoint {

// One range to write. The back end fills in `done` and `fruitless`.
struct Write {
    int fd = -1;
    const unsigned char *data = nullptr;
    std::size_t bytes = 0;
    std::uint64_t offset = 0;
    bool is_direct = false;
    const std::atomic<bool> *is_dropped = nullptr; // set: do not begin, answer ECANCELED
    std::size_t done = 0;
    int fruitless = 0; // attempts in a row that wrote nothing

    // What one attempt led to. Returns false while there is more to write; otherwise `error` is
    // 0 or the errno that the write ends with.
    bool advance(ssize_t result, int errno_of_result, int &error);
};

// Called once for each write, by a thread of the back end that holds none of its locks.
using Written = std::function<void(Write &, int error)>;

class Io {
  public:
    virtual ~Io() = default;

    // Puts a write into the queue; it must stay where it is until `Written` was called. Does not
    // block.
    virtual void submit(Write &write) = 0;

    // Works until `stop`, in each of `threads()` threads. What is in the queue by then is still
    // done, or dropped if it says so.
    virtual void run() = 0;
    virtual int threads() const = 0;
    virtual void stop() = 0;

    virtual const char *name() const = 0;
};

// Threads that call pwrite.
std::unique_ptr<Io> make_thread_io(int threads, Written written);

// io_uring with up to `depth` writes at once; nullptr, with the reason in `why_not`, where the
// kernel, the container or the build has none.
std::unique_ptr<Io> make_uring_io(int depth, Written written, std::string &why_not);

} // namespace lowtide::checkpoint
