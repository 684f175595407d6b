#include "slab_ring.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>

#include "file_spec.hpp"

namespace lowtide::checkpoint {
namespace {

constexpr std::size_t huge_page_bytes = 2 * 1024 * 1024;
constexpr std::size_t largest_slab_bytes = 1024 * 1024 * 1024; // io_uring counts in 32 bits

} // namespace

SlabRing::SlabRing(std::size_t buffer_bytes, std::size_t slab_bytes)
    : slab_bytes_(slab_bytes), slabs_(0) {
    if (slab_bytes == 0 || slab_bytes % page_bytes != 0 || slab_bytes > largest_slab_bytes) {
        throw std::invalid_argument("chunk_bytes: got " + std::to_string(slab_bytes) +
                                    ", allowed is a multiple of 4096 up to 1073741824");
    }
    slabs_ = buffer_bytes / slab_bytes;
    if (slabs_ < 2 || buffer_bytes % slab_bytes != 0) {
        throw std::invalid_argument("buffer_bytes: got " + std::to_string(buffer_bytes) +
                                    ", allowed is a multiple of chunk_bytes, " +
                                    std::to_string(slab_bytes) + ", and at least twice as much");
    }
    mapped_bytes_ = buffer_bytes + huge_page_bytes;
    mapping_ =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) {
        throw std::system_error(errno, std::generic_category(),
                                "buffer_bytes: cannot map " + std::to_string(buffer_bytes) +
                                    " bytes");
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(mapping_);
    memory_ = static_cast<unsigned char *>(mapping_) +
              (huge_page_bytes - begin % huge_page_bytes) % huge_page_bytes;
    // Both are wishes: fewer page faults, and no copy of the pages in a child process.
    madvise(memory_, buffer_bytes, MADV_HUGEPAGE);
    madvise(memory_, buffer_bytes, MADV_DONTFORK);
    free_.reserve(slabs_);
}

SlabRing::~SlabRing() { unmap(); }

void SlabRing::unmap() {
    if (mapping_ != nullptr) {
        munmap(mapping_, mapped_bytes_);
        mapping_ = nullptr;
    }
}

void SlabRing::touch(std::size_t number) const {
    unsigned char *const begin = memory_ + number * slab_bytes_;
#ifdef MADV_POPULATE_WRITE
    if (madvise(begin, slab_bytes_, MADV_POPULATE_WRITE) == 0) {
        return;
    }
#endif
    for (std::size_t offset = 0; offset < slab_bytes_; offset += page_bytes) {
        *static_cast<volatile unsigned char *>(begin + offset) = 0;
    }
}

Bytes SlabRing::slab(int number) const {
    return Bytes(memory_ + static_cast<std::size_t>(number) * slab_bytes_, slab_bytes_);
}

int SlabRing::take() {
    if (free_.empty()) {
        return none;
    }
    const int number = free_.back();
    free_.pop_back();
    return number;
}

void SlabRing::give(int number) { free_.push_back(number); }

} // namespace lowtide::checkpoint
