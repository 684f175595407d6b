// Floating point as it is at a process's start, for code whose bits must not depend on the caller.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace lowtide {

// While it lives, this thread rounds to nearest and keeps subnormal numbers, whatever the caller
// has set; a pool's threads never see the caller's setting, so obeying it would split the work.
class DefaultArithmetic {
  public:
    DefaultArithmetic(const DefaultArithmetic &) = delete;
    DefaultArithmetic &operator=(const DefaultArithmetic &) = delete;
#if defined(__x86_64__)
    DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80u); }
    ~DefaultArithmetic() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
    DefaultArithmetic() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&before_); }

  private:
    std::fenv_t before_;
#endif
};

} // namespace lowtide
