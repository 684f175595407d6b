#include "file_calls.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>

namespace lowtide::checkpoint {
namespace {

constexpr std::uint64_t free_share = 4; // of the free space a guess may take one part in so many

// What the file is expected to become is a guess, so it must not keep others from their space, nor
// take a host's memory.
bool has_room_to_guess(int fd, std::uint64_t bytes) {
    struct statfs found{};
    if (retried([&] { return ::fstatfs(fd, &found); }) != 0 || found.f_type == TMPFS_MAGIC) {
        return false;
    }
    const auto block =
        static_cast<std::uint64_t>(found.f_frsize > 0 ? found.f_frsize : found.f_bsize);
    return bytes <= static_cast<std::uint64_t>(found.f_bavail) * block / free_share;
}

} // namespace

int open_for_writing(const std::string &path, bool &use_direct) {
    struct stat found{};
    if (::lstat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode)) {
        ::unlink(path.c_str()); // if it stays, opening tells why
    }
    constexpr int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
    constexpr mode_t mode = 0666;
    if (use_direct) {
        const int fd = retried([&] { return ::open(path.c_str(), flags | O_DIRECT, mode); });
        if (fd >= 0 || errno != EINVAL) {
            return fd;
        }
        use_direct = false;
    }
    return retried([&] { return ::open(path.c_str(), flags, mode); });
}

int reserve_bytes(int fd, std::uint64_t bytes) {
    if (bytes == 0 ||
        retried([&] { return fallocate(fd, 0, 0, static_cast<off_t>(bytes)); }) == 0) {
        return 0;
    }
    const bool is_unsupported = errno == EOPNOTSUPP || errno == EINVAL || errno == ENODEV ||
                                errno == ENOSYS || errno == ESPIPE;
    return is_unsupported ? 0 : errno;
}

bool reserve_guess(int fd, std::uint64_t expected, std::uint64_t &reserved) {
    if (!has_room_to_guess(fd, expected)) {
        return true;
    }
    if (reserve_bytes(fd, expected) == 0) {
        reserved = expected;
        return true;
    }
    // What failed may have taken all that there was, and have moved the size.
    return retried([&] { return ::ftruncate(fd, 0); }) == 0;
}

int write_late(int fd, const std::vector<LateBytes> &late) {
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_DIRECT) != 0) {
        return -1;
    }
    for (const LateBytes &each : late) {
        for (std::size_t done = 0; done < each.count;) {
            const ssize_t result = pwrite(fd, each.bytes.data() + done, each.count - done,
                                          static_cast<off_t>(each.offset + done));
            if (result <= 0 && errno != EINTR) {
                errno = result == 0 ? EIO : errno;
                return -1;
            }
            done += result < 0 ? 0 : static_cast<std::size_t>(result);
        }
    }
    return 0;
}

} // namespace lowtide::checkpoint
