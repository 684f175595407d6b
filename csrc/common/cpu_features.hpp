// What the processor can do, asked once at run time. The build never uses -march=native: one
// binary runs everywhere, and a function that needs more than the base instruction set says so
// with LOWTIDE_TARGET and is called only behind a check of cpu_features().
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LOWTIDE_X86 1
#define LOWTIDE_TARGET(features) __attribute__((target(features)))
#else
#define LOWTIDE_X86 0
#define LOWTIDE_TARGET(features)
#endif

namespace lowtide {

// Levels that kernels dispatch on. `avx512` means F, BW, DQ and VL together: every server that
// has one of the last three has them all, and kernels may then use any of them.
struct CpuFeatures {
    bool sse42 = false;
    bool pclmul = false;
    bool avx2 = false; // with FMA and F16C
    bool avx512 = false;
};

// Thread-safe and cheap after the first call. The builtins also ask the operating system whether
// it saves the wide registers.
inline const CpuFeatures &cpu_features() {
    static const CpuFeatures found = [] {
        CpuFeatures f;
#if LOWTIDE_X86
        __builtin_cpu_init();
        f.sse42 = __builtin_cpu_supports("sse4.2");
        f.pclmul = __builtin_cpu_supports("pclmul");
        f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c");
        f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
#endif
        return f;
    }();
    return found;
}

} // namespace lowtide
