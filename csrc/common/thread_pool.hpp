// Threads that wait for work, for loops over long arrays.
#pragma once

#include <cstddef>
#include <functional>

namespace lowtide {

constexpr unsigned max_threads = 1024;

// Work on elements begin to end - 1; must not throw, and must not call run_in_ranges().
using RangeFunction = std::function<void(std::size_t begin, std::size_t end)>;

// Call `function` once for each of the contiguous ranges that make up 0 to count - 1, and return
// when all are done. Every range begins at a multiple of `align`. The calling thread works too,
// with up to `threads` - 1 others; where the system grants fewer, or all are busy with another
// call, those that are there do everything.
//
// The threads are started at the first need and kept. Calls from several threads at once share
// them. After a fork the child starts its own.
void run_in_ranges(std::size_t count, std::size_t align, unsigned threads,
                   const RangeFunction &function);

// Must not throw, and must not call run_in_ranges() or run_tasks().
using TaskFunction = std::function<void(std::size_t task)>;

// Call `function` once for each of 0 to count - 1, each of which is work enough for a thread.
// Otherwise as run_in_ranges().
void run_tasks(std::size_t count, unsigned threads, const TaskFunction &function);

} // namespace lowtide
