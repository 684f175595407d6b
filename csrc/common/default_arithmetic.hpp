// Floating-point arithmetic as at a process's start, for a scope.
#pragma once

#include "cpu_features.hpp"

#if LOWTIDE_X86
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace lowtide {

// While it lives, this thread rounds to nearest and keeps subnormal numbers, whatever the caller
// has set; a pool's threads never see the caller's setting, so obeying it would split the array.
class DefaultArithmetic {
  public:
    DefaultArithmetic(const DefaultArithmetic &) = delete;
    DefaultArithmetic &operator=(const DefaultArithmetic &) = delete;
#if LOWTIDE_X86
    DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80u); } // as at a process's start
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
