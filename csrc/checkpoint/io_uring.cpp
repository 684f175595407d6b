#include "io.hpp"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#if defined(__NR_io_uring_setup) && defined(IORING_FEAT_SINGLE_MMAP)
#define LOWTIDE_HAS_URING 1
#endif
#endif

#ifdef LOWTIDE_HAS_URING

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

namespace lowtide::checkpoint {
namespace {

// An index that the kernel reads or writes at the same time.
unsigned load_shared(const unsigned *index) { return __atomic_load_n(index, __ATOMIC_ACQUIRE); }
void store_shared(unsigned *index, unsigned value) {
    __atomic_store_n(index, value, __ATOMIC_RELEASE);
}

// A file descriptor and the mappings of one ring; filled in step by step, undone as a whole.
struct Ring {
    int fd = -1;
    int wake_fd = -1;
    io_uring_params parameters{};
    unsigned char *rings = nullptr; // both rings of indices: one mapping
    std::size_t rings_bytes = 0;
    io_uring_sqe *entries = nullptr;
    std::size_t entries_bytes = 0;

    Ring() = default;
    Ring(const Ring &) = delete;
    Ring &operator=(const Ring &) = delete;

    ~Ring() {
        if (entries != nullptr) {
            munmap(entries, entries_bytes);
        }
        if (rings != nullptr) {
            munmap(rings, rings_bytes);
        }
        for (const int each : {fd, wake_fd}) {
            if (each >= 0) {
                close(each);
            }
        }
    }

    unsigned *index(unsigned offset) const { return reinterpret_cast<unsigned *>(rings + offset); }

    bool has_writes() const {
        constexpr unsigned slots = 256;
        std::vector<unsigned char> memory(sizeof(io_uring_probe) +
                                          slots * sizeof(io_uring_probe_op));
        auto *const probe = reinterpret_cast<io_uring_probe *>(memory.data());
        if (syscall(__NR_io_uring_register, fd, IORING_REGISTER_PROBE, probe, slots) < 0) {
            return false;
        }
        const auto has = [probe](unsigned operation) {
            return operation <= probe->last_op &&
                   (probe->ops[operation].flags & IO_URING_OP_SUPPORTED) != 0;
        };
        return has(IORING_OP_WRITE) && has(IORING_OP_POLL_ADD);
    }

    // Returns why it cannot be used, or an empty text.
    std::string open(unsigned depth) {
        fd = static_cast<int>(syscall(__NR_io_uring_setup, depth, &parameters));
        if (fd < 0) {
            return std::string("io_uring_setup: ") + std::strerror(errno);
        }
        if ((parameters.features & IORING_FEAT_SINGLE_MMAP) == 0 || !has_writes()) {
            return "io_uring: this kernel's version is too old (5.6 is needed)";
        }
        rings_bytes = parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned);
        const std::size_t completions =
            parameters.cq_off.cqes + parameters.cq_entries * sizeof(io_uring_cqe);
        rings_bytes = rings_bytes < completions ? completions : rings_bytes;
        void *mapped = mmap(nullptr, rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                            fd, IORING_OFF_SQ_RING);
        if (mapped == MAP_FAILED) {
            return std::string("io_uring: mmap: ") + std::strerror(errno);
        }
        rings = static_cast<unsigned char *>(mapped);
        entries_bytes = parameters.sq_entries * sizeof(io_uring_sqe);
        mapped = mmap(nullptr, entries_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                      IORING_OFF_SQES);
        if (mapped == MAP_FAILED) {
            return std::string("io_uring: mmap: ") + std::strerror(errno);
        }
        entries = static_cast<io_uring_sqe *>(mapped);
        wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        return wake_fd < 0 ? std::string("eventfd: ") + std::strerror(errno) : "";
    }
};

// One thread owns the ring: requests belong to the thread that hands them to the kernel and would
// end with it. The others only put writes into the queue and wake it.
class UringIo : public Io {
  public:
    UringIo(std::unique_ptr<Ring> ring, std::size_t depth, Written written)
        : ring_(std::move(ring)), depth_(depth), written_(std::move(written)) {}

    void submit(Write &write) override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            queue_.push_back(&write);
        }
        wake();
    }

    void stop() override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            is_stopped_ = true;
        }
        wake();
    }

    int threads() const override { return 1; }
    const char *name() const override { return "io_uring"; }

    void run() override {
        for (;;) {
            if (!is_polling_) {
                prepare_poll();
            }
            if (!start_queued() && in_flight_ == 0) {
                return;
            }
            const long result = syscall(__NR_io_uring_enter, ring_->fd, unsubmitted_, 1u,
                                        IORING_ENTER_GETEVENTS, nullptr, 0);
            if (result >= 0) {
                unsubmitted_ -= static_cast<unsigned>(result);
            } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
                // Not known to happen. Writes in flight may still use their memory, so they are
                // not answered: their job stays open, and closing the writer gives up on it.
                return;
            }
            take_completions();
        }
    }

  private:
    void wake() const {
        const std::uint64_t one = 1;
        // It can only fail when the counter is full, and then the thread is awake anyway.
        [[maybe_unused]] const ssize_t result = write(ring_->wake_fd, &one, sizeof(one));
    }

    // The next free submission entry. There is always one: the ring has room for `depth_` writes
    // and the poll.
    io_uring_sqe &next_entry() {
        unsigned *const tail = ring_->index(ring_->parameters.sq_off.tail);
        const unsigned mask = *ring_->index(ring_->parameters.sq_off.ring_mask);
        const unsigned at = *tail & mask;
        ring_->index(ring_->parameters.sq_off.array)[at] = at;
        std::memset(&ring_->entries[at], 0, sizeof(io_uring_sqe));
        return ring_->entries[at];
    }

    void publish_entry() {
        unsigned *const tail = ring_->index(ring_->parameters.sq_off.tail);
        store_shared(tail, *tail + 1);
        ++unsubmitted_;
    }

    void prepare_poll() {
        io_uring_sqe &entry = next_entry();
        entry.opcode = IORING_OP_POLL_ADD;
        entry.fd = ring_->wake_fd;
        entry.poll_events = POLLIN;
        publish_entry(); // user_data stays 0, which no write has
        is_polling_ = true;
    }

    void prepare_write(Write &write) {
        io_uring_sqe &entry = next_entry();
        entry.opcode = IORING_OP_WRITE;
        entry.fd = write.fd;
        entry.addr = reinterpret_cast<std::uintptr_t>(write.data + write.done);
        entry.len = static_cast<unsigned>(write.bytes - write.done);
        entry.off = write.offset + write.done;
        entry.user_data = reinterpret_cast<std::uintptr_t>(&write);
        // Into the page cache the kernel would copy here and now, and hold up all others.
        entry.flags = write.is_direct && write.fruitless == 0 ? 0 : IOSQE_ASYNC;
        publish_entry();
        ++in_flight_;
    }

    // Hands queued writes to the kernel while there is room. Returns false when stopped and done.
    bool start_queued() {
        for (;;) {
            Write *write = nullptr;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (queue_.empty()) {
                    return !is_stopped_;
                }
                if (in_flight_ == depth_) {
                    return true;
                }
                write = queue_.front();
                queue_.pop_front();
            }
            if (write->is_dropped->load(std::memory_order_relaxed)) {
                written_(*write, ECANCELED);
            } else {
                prepare_write(*write);
            }
        }
    }

    void take_completions() {
        const io_uring_params &parameters = ring_->parameters;
        unsigned *const head = ring_->index(parameters.cq_off.head);
        const unsigned mask = *ring_->index(parameters.cq_off.ring_mask);
        const auto *const completions =
            reinterpret_cast<const io_uring_cqe *>(ring_->rings + parameters.cq_off.cqes);
        while (*head != load_shared(ring_->index(parameters.cq_off.tail))) {
            const io_uring_cqe completion = completions[*head & mask];
            store_shared(head, *head + 1);
            if (completion.user_data == 0) {
                std::uint64_t count = 0;
                [[maybe_unused]] const ssize_t result = read(ring_->wake_fd, &count, sizeof(count));
                is_polling_ = false;
            } else {
                complete(*reinterpret_cast<Write *>(completion.user_data), completion.res);
            }
        }
    }

    void complete(Write &write, int result) {
        --in_flight_;
        int error = 0;
        if (write.advance(result, result < 0 ? -result : 0, error)) {
            written_(write, error);
            return;
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        queue_.push_front(&write);
    }

    const std::unique_ptr<Ring> ring_;
    const std::size_t depth_;
    const Written written_;
    std::mutex mutex_; // guards the next two
    std::deque<Write *> queue_;
    bool is_stopped_ = false;
    // Only the ring's thread uses these.
    std::size_t in_flight_ = 0;
    unsigned unsubmitted_ = 0;
    bool is_polling_ = false;
};

} // namespace

std::unique_ptr<Io> make_uring_io(int depth, Written written, std::string &why_not) {
    auto ring = std::make_unique<Ring>();
    why_not = ring->open(static_cast<unsigned>(depth) + 1);
    if (!why_not.empty()) {
        return nullptr;
    }
    return std::make_unique<UringIo>(std::move(ring), static_cast<std::size_t>(depth),
                                     std::move(written));
}

} // namespace lowtide::checkpoint

#else

namespace lowtide::checkpoint {

std::unique_ptr<Io> make_uring_io(int, Written, std::string &why_not) {
    why_not = "io_uring: this build has no <linux/io_uring.h>";
    return nullptr;
}

} // namespace lowtide::checkpoint

#endif
