// What the writer asks of the file system, beside writing.
#pragma once

#include <cerrno>
#include <cstdint>
#include <string>
#include <vector>

#include "capture.hpp"

namespace lowtide::checkpoint {

// Calls again what a signal has interrupted.
template <typename Call> int retried(Call call) {
    int result = 0;
    do {
        result = call();
    } while (result < 0 && errno == EINTR);
    return result;
}

// Opens for direct I/O if that is wanted and possible; says in `use_direct` what it became.
// What stands at the path is removed, not written over: a write of a job that has failed may still
// be under way there, and must not end in the new file.
int open_for_writing(const std::string &path, bool &use_direct);

// A full disk shows now and not after minutes of writing. Returns an errno or 0.
int reserve_bytes(int fd, std::uint64_t bytes);

// Reserves what a file that was just opened may become, because the kernel lets no write pass while
// it reserves more. Its size moves along: writes beyond that would wait for each other too.
// Says in `reserved` how much; true if nothing failed that would have to be given back.
bool reserve_guess(int fd, std::uint64_t expected, std::uint64_t &reserved);

// Writes into chunks that are written already. It is no whole pages, so it goes through the page
// cache. Returns -1, with errno, if one fails.
int write_late(int fd, const std::vector<LateBytes> &late);

} // namespace lowtide::checkpoint
