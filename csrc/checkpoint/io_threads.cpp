#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "file_spec.hpp"
#include "io.hpp"

namespace lowtide::checkpoint {
namespace {

constexpr int most_fruitless = 100; // then a file that takes no byte is an error

class ThreadIo : public Io {
  public:
    ThreadIo(int threads, Written written) : threads_(threads), written_(std::move(written)) {}

    void submit(Write &write) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        queue_.push_back(&write);
        changed_.notify_one();
    }

    void run() override {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return is_stopped_ || !queue_.empty(); });
            if (queue_.empty()) {
                return;
            }
            Write &write = *queue_.front();
            queue_.pop_front();
            lock.unlock();
            written_(write, perform(write));
            lock.lock();
        }
    }

    void stop() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        is_stopped_ = true;
        changed_.notify_all();
    }

    int threads() const override { return threads_; }
    const char *name() const override { return "threads"; }

  private:
    static int perform(Write &write) {
        int error = 0;
        ssize_t result = 0;
        do {
            if (write.is_dropped->load(std::memory_order_relaxed)) {
                return ECANCELED;
            }
            if (write.fruitless > 1) {
                std::this_thread::yield();
            }
            result = pwrite(write.fd, write.data + write.done, write.bytes - write.done,
                            static_cast<off_t>(write.offset + write.done));
        } while (!write.advance(result, errno, error));
        return error;
    }

    const int threads_;
    const Written written_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Write *> queue_;
    bool is_stopped_ = false;
};

} // namespace

bool Write::advance(ssize_t result, int errno_of_result, int &error) {
    const bool is_interrupted = errno_of_result == EINTR || errno_of_result == EAGAIN;
    if (result < 0 && !is_interrupted) {
        error = errno_of_result;
        return true;
    }
    std::size_t advanced = result < 0 ? 0 : static_cast<std::size_t>(result);
    if (is_direct && done + advanced < bytes) {
        advanced -= advanced % page_bytes; // what follows must begin on a page again
    }
    done += advanced;
    fruitless = advanced == 0 ? fruitless + 1 : 0;
    if (done < bytes && fruitless > most_fruitless) {
        error = result < 0 ? errno_of_result : EIO;
        return true;
    }
    error = 0;
    return done >= bytes;
}

std::unique_ptr<Io> make_thread_io(int threads, Written written) {
    return std::make_unique<ThreadIo>(threads, std::move(written));
}

} // namespace lowtide::checkpoint
