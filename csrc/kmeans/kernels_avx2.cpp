#include "common/cpu_features.hpp"
#include "pass.hpp"

#if LOWTIDE_X86
#include <immintrin.h>

#define LOWTIDE_KMEANS_LEVEL avx2
#define LOWTIDE_KMEANS_TARGET LOWTIDE_TARGET("avx2,fma")
#include "kernels.hpp"

namespace lowtide::kmeans {
namespace avx2 {

#define OP LOWTIDE_KMEANS_INLINE static

// Masks of loads: the elements from first_of(count) on begin with `count` ones.
alignas(64) constexpr std::int32_t ones32[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
alignas(64) constexpr std::int64_t ones64[8] = {-1, -1, -1, -1};

struct Double {
    using T = double;
    using R = __m256d;
    using Mask = __m256d;
    static constexpr std::size_t width = 4;
    static constexpr int columns = columns_with(16);

    OP R load(const T *p) { return _mm256_loadu_pd(p); }
    OP void store(T *p, R a) { _mm256_storeu_pd(p, a); }
    OP R broadcast(T a) { return _mm256_set1_pd(a); }
    OP R fma(R a, R b, R c) { return _mm256_fmadd_pd(a, b, c); }
    OP T fma_one(T a, T b, T c) { return __builtin_fma(a, b, c); }
    OP R add(R a, R b) { return _mm256_add_pd(a, b); }
    OP R subtract(R a, R b) { return _mm256_sub_pd(a, b); }
    OP R multiply(R a, R b) { return _mm256_mul_pd(a, b); }
    OP R min(R a, R b) { return _mm256_min_pd(a, b); } // b if one is NaN
    OP R magnitude(R a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
    OP Mask less(R a, R b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
    OP R blend(Mask m, R yes, R no) { return _mm256_blendv_pd(no, yes, m); }
    OP unsigned lanes(Mask m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
    OP unsigned differ(R a, R b) { return lanes(_mm256_cmp_pd(a, b, _CMP_NEQ_UQ)); }
    OP unsigned not_within(R a, R b) { return lanes(_mm256_cmp_pd(a, b, _CMP_NLE_UQ)); }

    using Wide = Double;
    // Elements in float64; where `count` are fewer than a vector, the rest are zeros and not read.
    OP R widened(const T *p, std::size_t count) {
        if (count >= width) {
            return load(p);
        }
        const auto *const ones = reinterpret_cast<const __m256i *>(ones64 + width - count);
        return _mm256_maskload_pd(p, _mm256_loadu_si256(ones));
    }
    OP double total(R a) {
        alignas(32) double each[width];
        store(each, a);
        return (each[0] + each[1]) + (each[2] + each[3]);
    }
};

struct Float {
    using T = float;
    using R = __m256;
    using Mask = __m256;
    static constexpr std::size_t width = 8;
    static constexpr int columns = columns_with(16);

    OP R load(const T *p) { return _mm256_loadu_ps(p); }
    OP void store(T *p, R a) { _mm256_storeu_ps(p, a); }
    OP R broadcast(T a) { return _mm256_set1_ps(a); }
    OP R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
    OP T fma_one(T a, T b, T c) { return __builtin_fmaf(a, b, c); }
    OP R add(R a, R b) { return _mm256_add_ps(a, b); }
    OP R subtract(R a, R b) { return _mm256_sub_ps(a, b); }
    OP R multiply(R a, R b) { return _mm256_mul_ps(a, b); }
    OP R min(R a, R b) { return _mm256_min_ps(a, b); }
    OP R magnitude(R a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    OP Mask less(R a, R b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
    OP R blend(Mask m, R yes, R no) { return _mm256_blendv_ps(no, yes, m); }
    OP unsigned lanes(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
    OP unsigned differ(R a, R b) { return lanes(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)); }
    OP unsigned not_within(R a, R b) { return lanes(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }

    using Wide = Double;
    OP __m256d widened(const T *p, std::size_t count) {
        if (count >= Double::width) {
            return _mm256_cvtps_pd(_mm_loadu_ps(p));
        }
        const auto *const ones = reinterpret_cast<const __m128i *>(ones32 + 8 - count);
        return _mm256_cvtps_pd(_mm_maskload_ps(p, _mm_loadu_si128(ones)));
    }
};

#undef OP
} // namespace avx2

template <> const Kernels<float> *kernels_avx2() {
    return cpu_features().avx2 ? &avx2::table<avx2::Float> : nullptr;
}

template <> const Kernels<double> *kernels_avx2() {
    return cpu_features().avx2 ? &avx2::table<avx2::Double> : nullptr;
}

} // namespace lowtide::kmeans
#else
namespace lowtide::kmeans {
template <> const Kernels<float> *kernels_avx2() { return nullptr; }
template <> const Kernels<double> *kernels_avx2() { return nullptr; }
} // namespace lowtide::kmeans
#endif
