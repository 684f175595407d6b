#include "adam.hpp"
#include "adam_memory.hpp"
#include "common/cpu_features.hpp"

#if LOWTIDE_X86
#include <immintrin.h>

#define LOWTIDE_AVX2 LOWTIDE_TARGET("avx2,fma,f16c")

namespace lowtide::offload {
namespace {

constexpr std::size_t lanes = 8;

struct Scalars {
    __m256 beta1, beta2, one_minus_beta1, one_minus_beta2;
    __m256 inverse_root_bias2, eps, step_size, decay, grad_scale;
};

struct Vectors {
    __m256 param, exp_avg, exp_avg_sq;
};

LOWTIDE_AVX2 inline Scalars spread(const AdamStep &step) {
    return {_mm256_set1_ps(step.beta1),
            _mm256_set1_ps(step.beta2),
            _mm256_set1_ps(step.one_minus_beta1),
            _mm256_set1_ps(step.one_minus_beta2),
            _mm256_set1_ps(step.inverse_root_bias2),
            _mm256_set1_ps(step.eps),
            _mm256_set1_ps(step.step_size),
            _mm256_set1_ps(step.decay),
            _mm256_set1_ps(step.grad_scale)};
}

LOWTIDE_AVX2 inline __m256 load_grad(const unsigned char *grad, Type type, std::size_t i) {
    if (type == Type::float32) {
        return _mm256_loadu_ps(reinterpret_cast<const float *>(grad + 4 * i));
    }
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i *>(grad + 2 * i));
    if (type == Type::float16) {
        return _mm256_cvtph_ps(stored);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
}

// The low halves of eight 32-bit numbers, none above 0xFFFF.
LOWTIDE_AVX2 inline __m128i low_halves(__m256i wide) {
    const __m256i packed = _mm256_packus_epi32(wide, wide); // within each half of the vector
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

LOWTIDE_AVX2 inline __m128i as_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return low_halves(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(bfloat16_nan), is_nan));
}

LOWTIDE_AVX2 inline __m128i as_float16(__m256 value) {
    const __m128i rounded = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m128i narrow = low_halves(_mm256_srli_epi32(is_nan, 16));
    return _mm_blendv_epi8(rounded, _mm_set1_epi16(float16_nan), narrow);
}

// `streams`: past the caches, to an address that is a multiple of the vector's size.
LOWTIDE_AVX2 inline void store_low(unsigned char *low, Type type, std::size_t i, __m256 value,
                                   bool streams) {
    if (type == Type::float32) {
        auto *const place = reinterpret_cast<float *>(low + 4 * i);
        streams ? _mm256_stream_ps(place, value) : _mm256_storeu_ps(place, value);
        return;
    }
    auto *const place = reinterpret_cast<__m128i *>(low + 2 * i);
    const __m128i stored = type == Type::bfloat16 ? as_bfloat16(value) : as_float16(value);
    streams ? _mm_stream_si128(place, stored) : _mm_storeu_si128(place, stored);
}

// As updated_as_torch() in adam_element.hpp, operation by operation.
LOWTIDE_AVX2 inline Vectors updated_as_torch(const Scalars &s, Vectors e, __m256 grad) {
    const __m256 decayed = _mm256_mul_ps(e.param, s.decay);
    const __m256 away = _mm256_sub_ps(grad, e.exp_avg);
    e.exp_avg = _mm256_fmadd_ps(s.one_minus_beta1, away, e.exp_avg);
    const __m256 weighted = _mm256_mul_ps(s.one_minus_beta2, grad);
    e.exp_avg_sq = _mm256_mul_ps(e.exp_avg_sq, s.beta2);
    e.exp_avg_sq = _mm256_fmadd_ps(weighted, grad, e.exp_avg_sq);
    const __m256 root = _mm256_div_ps(_mm256_sqrt_ps(e.exp_avg_sq), s.inverse_root_bias2);
    const __m256 below = _mm256_add_ps(root, s.eps);
    const __m256 moved = _mm256_div_ps(_mm256_mul_ps(s.step_size, e.exp_avg), below);
    e.param = _mm256_add_ps(decayed, moved);
    return e;
}

// As updated() in adam_element.hpp in Order::vector, operation by operation.
LOWTIDE_AVX2 inline Vectors updated(const Scalars &s, Decay mode, Vectors e, __m256 grad) {
    if (mode == Decay::torch_decoupled) {
        return updated_as_torch(s, e, grad);
    }
    if (mode == Decay::l2) {
        grad = _mm256_fmadd_ps(e.param, s.decay, grad);
    }
    e.exp_avg = _mm256_mul_ps(e.exp_avg, s.beta1);
    e.exp_avg = _mm256_fmadd_ps(grad, s.one_minus_beta1, e.exp_avg);
    e.exp_avg_sq = _mm256_mul_ps(e.exp_avg_sq, s.beta2);
    const __m256 square = _mm256_mul_ps(grad, grad);
    e.exp_avg_sq = _mm256_fmadd_ps(square, s.one_minus_beta2, e.exp_avg_sq);
    const __m256 root = _mm256_sqrt_ps(e.exp_avg_sq);
    const __m256 below = _mm256_fmadd_ps(root, s.inverse_root_bias2, s.eps);
    const __m256 direction = _mm256_div_ps(e.exp_avg, below);
    if (mode == Decay::decoupled) {
        e.param = _mm256_fmadd_ps(e.param, s.decay, e.param);
    }
    e.param = _mm256_fmadd_ps(direction, s.step_size, e.param);
    return e;
}

} // namespace

LOWTIDE_AVX2
void adam_range_avx2(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
                     std::size_t end) {
    const Scalars scalars = spread(step);
    const Decay mode = step.mode;
    const AdamArrays a = arrays; // a copy, which the stores below cannot change
    float *const param = a.param.data();
    float *const exp_avg = a.exp_avg.data();
    float *const exp_avg_sq = a.exp_avg_sq.data();
    const bool streams = streams_low(a, begin);
    std::size_t i = begin;
    for (; end - i >= lanes; i += lanes) {
        const __m256 grad =
            _mm256_mul_ps(load_grad(a.grad.data(), a.grad_type, i), scalars.grad_scale);
        if (!a.kept_grad.empty()) {
            _mm256_storeu_ps(a.kept_grad.data() + i, grad);
        }
        for (const float *array : {param, exp_avg, exp_avg_sq}) {
            _mm_prefetch(ahead(array + i), _MM_HINT_T0);
        }
        const Vectors old{_mm256_loadu_ps(param + i), _mm256_loadu_ps(exp_avg + i),
                          _mm256_loadu_ps(exp_avg_sq + i)};
        const Vectors e = updated(scalars, mode, old, grad);
        _mm256_storeu_ps(param + i, e.param);
        _mm256_storeu_ps(exp_avg + i, e.exp_avg);
        _mm256_storeu_ps(exp_avg_sq + i, e.exp_avg_sq);
        if (!a.low.empty()) {
            store_low(a.low.data(), a.low_type, i, e.param, streams);
        }
    }
    _mm_sfence(); // no lock orders streamed stores for the thread that reads them
    adam_range_scalar(step, arrays, i, end);
}

} // namespace lowtide::offload
#endif // LOWTIDE_X86
