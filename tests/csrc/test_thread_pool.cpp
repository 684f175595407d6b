// Run under the sanitizers by tests/core/test_thread_pool.py.
#include "common/thread_pool.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

int failures = 0;

void expect(bool is_true, const char *what) {
    if (!is_true) {
        std::fprintf(stderr, "failed: %s\n", what);
        ++failures;
    }
}

// Every element is visited once, in ranges that begin where they may.
bool covers(std::size_t count, std::size_t align, unsigned threads) {
    std::vector<int> visits(count);
    bool is_aligned = true;
    std::mutex mutex;
    lowtide::run_in_ranges(count, align, threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            ++visits[i];
        }
        const std::lock_guard<std::mutex> lock(mutex);
        is_aligned = is_aligned && begin % align == 0 && begin < end && end <= count;
    });
    for (const int times : visits) {
        is_aligned = is_aligned && times == 1;
    }
    return is_aligned;
}

void test_all_counts_and_threads() {
    for (const std::size_t count : {0, 1, 15, 16, 17, 16384, 16385, 32769, 200003}) {
        for (const unsigned threads : {1, 2, 3, 8}) {
            expect(covers(count, 16, threads), "each element once");
        }
    }
}

void test_callers_share_the_threads() {
    std::vector<std::thread> callers;
    std::vector<int> is_right(4);
    for (std::size_t i = 0; i < is_right.size(); ++i) {
        callers.emplace_back([&is_right, i] {
            bool all = true;
            for (int round = 0; round < 50; ++round) {
                all = all && covers(70000, 16, 3);
            }
            is_right[i] = all ? 1 : 0;
        });
    }
    for (std::thread &caller : callers) {
        caller.join();
    }
    for (const int each : is_right) {
        expect(each == 1, "calls from several threads");
    }
}

void test_child_has_threads_of_its_own() {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); // a deadlock ends here
        _exit(covers(200003, 16, 4) ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a call after a fork");
    expect(covers(200003, 16, 4), "a call of the parent after a fork");
}

} // namespace

int main(int argc, char **) {
    test_all_counts_and_threads();
    test_callers_share_the_threads();
    if (argc == 1) { // with any argument: not under a sanitizer that forbids it
        test_child_has_threads_of_its_own();
    }
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
