#include "thread_pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace lowtide {
namespace {

// Several ranges for each thread: one that loses its core to somebody else delays the others by
// a part of its share only. Ranges below the minimum cost more to hand out than they save.
constexpr std::size_t ranges_per_thread = 4;
constexpr std::size_t min_range = 16384;

struct Job {
    const RangeFunction &function;
    const std::size_t count;
    const std::size_t range;
    std::atomic<std::size_t> next{0};
    unsigned wanted; // helpers still to come; guarded by the pool's mutex, as is:
    unsigned active = 0;

    void work() {
        for (;;) {
            const std::size_t begin = next.fetch_add(range);
            if (begin >= count) {
                return;
            }
            function(begin, std::min(count, begin + range));
        }
    }
};

class Pool {
  public:
    void run(Job &job) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            waiting_.push_back(&job);
            ensure_threads();
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        const auto place = std::find(waiting_.begin(), waiting_.end(), &job);
        if (place != waiting_.end()) { // some helpers never came, and now need not
            waiting_.erase(place);
        }
        finished_.wait(lock, [&job] { return job.active == 0; });
    }

  private:
    // Enough for everything that waits. A thread that cannot be started is not missed: the
    // caller does its share.
    void ensure_threads() {
        std::size_t wanted = busy_;
        for (const Job *job : waiting_) {
            wanted += job->wanted;
        }
        wanted = std::min<std::size_t>(wanted, max_threads);
        sigset_t all;
        sigset_t before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); // signals are for the threads of Python
        try {
            for (; started_ < wanted; ++started_) {
                std::thread([this] { serve(); }).detach();
            }
        } catch (const std::system_error &) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return !waiting_.empty(); });
            Job &job = *waiting_.front();
            if (--job.wanted == 0) {
                waiting_.pop_front();
            }
            ++job.active;
            ++busy_;
            lock.unlock();
            job.work();
            lock.lock();
            --busy_;
            if (--job.active == 0) {
                finished_.notify_all();
            }
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable finished_;
    std::deque<Job *> waiting_;
    std::size_t started_ = 0;
    std::size_t busy_ = 0;
};

// Never deleted: its threads wait in it until the process ends.
std::atomic<Pool *> current{nullptr};

Pool &pool() {
    Pool *found = current.load();
    if (found == nullptr) {
        auto *made = new Pool;
        if (current.compare_exchange_strong(found, made)) {
            return *made;
        }
        delete made; // another thread was first, and this one has started nothing
    }
    return *found;
}

// In a child of fork() the threads are gone and the mutex may be locked for ever.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });

std::size_t rounded_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// `range` elements at a time, of `count` > 0.
void run_shared(std::size_t count, std::size_t range, unsigned threads,
                const RangeFunction &function) {
    const std::size_t ranges = (count - 1) / range + 1;
    const auto workers = static_cast<unsigned>(std::min<std::size_t>(threads, ranges));
    Job job{function, count, range, {0}, workers <= 1 ? 0 : workers - 1};
    if (workers <= 1) {
        job.work();
    } else {
        pool().run(job);
    }
}

} // namespace

void run_in_ranges(std::size_t count, std::size_t align, unsigned threads,
                   const RangeFunction &function) {
    if (count == 0) {
        return;
    }
    const std::size_t parts = std::size_t{threads} * ranges_per_thread;
    const std::size_t share = threads <= 1 ? count : std::max(min_range, count / parts + 1);
    const std::size_t range = rounded_up(share, align);
    run_shared(count, range, threads, function);
}

void run_tasks(std::size_t count, unsigned threads, const TaskFunction &function) {
    if (count != 0) {
        run_shared(count, 1, threads, [&](std::size_t task, std::size_t) { function(task); });
    }
}

} // namespace lowtide
