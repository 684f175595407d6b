// The memory that decouples capture from I/O: one mapping, cut into slabs of one chunk each.
#pragma once

#include <cstddef>
#include <vector>

#include "common/span.hpp"

namespace lowtide::checkpoint {

// Not thread-safe, except that `touch` and `slab` may run beside anything.
class SlabRing {
  public:
    static constexpr int none = -1;

    // Maps the memory without touching it: that can take seconds on a virtual machine. Throws
    // std::invalid_argument for sizes that do not fit and std::system_error.
    SlabRing(std::size_t buffer_bytes, std::size_t slab_bytes);
    ~SlabRing();
    SlabRing(const SlabRing &) = delete;
    SlabRing &operator=(const SlabRing &) = delete;

    // Gives the memory back to the system; no slab may be used any more.
    void unmap();

    // Gives a slab its physical memory.
    void touch(std::size_t number) const;

    Bytes slab(int number) const;

    // The number of a free slab, or `none`. The one freed last is first: its lines are warmest.
    int take();
    void give(int number);

    std::size_t slabs() const { return slabs_; }
    std::size_t slab_bytes() const { return slab_bytes_; }

  private:
    std::size_t slab_bytes_;
    std::size_t slabs_;
    std::size_t mapped_bytes_ = 0;
    void *mapping_ = nullptr;
    unsigned char *memory_ = nullptr;
    std::vector<int> free_;
};

} // namespace lowtide::checkpoint
