#include "common/cpu_features.hpp"
#include "pass.hpp"

#if LOWTIDE_X86
// GCC 12 finds fault with its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define LOWTIDE_KMEANS_LEVEL avx512
#define LOWTIDE_KMEANS_TARGET LOWTIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "kernels.hpp"

namespace lowtide::kmeans {
namespace avx512 {

#define OP LOWTIDE_KMEANS_INLINE static

struct Double {
    using T = double;
    using R = __m512d;
    using Mask = __mmask8;
    static constexpr std::size_t width = 8;
    static constexpr int columns = columns_with(32);

    OP R load(const T *p) { return _mm512_loadu_pd(p); }
    OP void store(T *p, R a) { _mm512_storeu_pd(p, a); }
    OP R broadcast(T a) { return _mm512_set1_pd(a); }
    OP R fma(R a, R b, R c) { return _mm512_fmadd_pd(a, b, c); }
    OP T fma_one(T a, T b, T c) { return __builtin_fma(a, b, c); }
    OP R add(R a, R b) { return _mm512_add_pd(a, b); }
    OP R subtract(R a, R b) { return _mm512_sub_pd(a, b); }
    OP R multiply(R a, R b) { return _mm512_mul_pd(a, b); }
    OP R min(R a, R b) { return _mm512_min_pd(a, b); }
    OP R magnitude(R a) { return _mm512_abs_pd(a); }
    OP Mask less(R a, R b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
    OP R blend(Mask m, R yes, R no) { return _mm512_mask_blend_pd(m, no, yes); }
    OP unsigned differ(R a, R b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ); }
    OP unsigned not_within(R a, R b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }

    using Wide = Double;
    OP R widened(const T *p, std::size_t count) {
        const auto mask = static_cast<__mmask8>(count >= width ? 0xFFu : (1u << count) - 1u);
        return _mm512_maskz_loadu_pd(mask, p);
    }
    OP double total(R a) { return _mm512_reduce_add_pd(a); }
};

struct Float {
    using T = float;
    using R = __m512;
    using Mask = __mmask16;
    static constexpr std::size_t width = 16;
    static constexpr int columns = columns_with(32);

    OP R load(const T *p) { return _mm512_loadu_ps(p); }
    OP void store(T *p, R a) { _mm512_storeu_ps(p, a); }
    OP R broadcast(T a) { return _mm512_set1_ps(a); }
    OP R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
    OP T fma_one(T a, T b, T c) { return __builtin_fmaf(a, b, c); }
    OP R add(R a, R b) { return _mm512_add_ps(a, b); }
    OP R subtract(R a, R b) { return _mm512_sub_ps(a, b); }
    OP R multiply(R a, R b) { return _mm512_mul_ps(a, b); }
    OP R min(R a, R b) { return _mm512_min_ps(a, b); } // b if one is NaN
    OP R magnitude(R a) { return _mm512_abs_ps(a); }
    OP Mask less(R a, R b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    OP R blend(Mask m, R yes, R no) { return _mm512_mask_blend_ps(m, no, yes); }
    OP unsigned differ(R a, R b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
    OP unsigned not_within(R a, R b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }

    using Wide = Double;
    // Elements in float64; where `count` are fewer than a vector, the rest are zeros and not read.
    OP __m512d widened(const T *p, std::size_t count) {
        const auto mask =
            static_cast<__mmask8>(count >= Double::width ? 0xFFu : (1u << count) - 1u);
        return _mm512_maskz_cvtps_pd(mask, _mm256_maskz_loadu_ps(mask, p));
    }
};

#undef OP
} // namespace avx512

template <> const Kernels<float> *kernels_avx512() {
    return cpu_features().avx512 ? &avx512::table<avx512::Float> : nullptr;
}

template <> const Kernels<double> *kernels_avx512() {
    return cpu_features().avx512 ? &avx512::table<avx512::Double> : nullptr;
}

} // namespace lowtide::kmeans
#else
namespace lowtide::kmeans {
template <> const Kernels<float> *kernels_avx512() { return nullptr; }
template <> const Kernels<double> *kernels_avx512() { return nullptr; }
} // namespace lowtide::kmeans
#endif
