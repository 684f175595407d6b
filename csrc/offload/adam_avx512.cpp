#include "adam.hpp"
#include "adam_memory.hpp"
#include "common/cpu_features.hpp"

#if LOWTIDE_X86
#include <immintrin.h>

#define LOWTIDE_AVX512 LOWTIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl")

namespace lowtide::offload {
namespace {

constexpr std::size_t lanes = 16;

struct Scalars {
    __m512 beta1, beta2, one_minus_beta1, one_minus_beta2;
    __m512 inverse_root_bias2, eps, step_size, decay, grad_scale;
};

struct Vectors {
    __m512 param, exp_avg, exp_avg_sq;
};

LOWTIDE_AVX512 inline Scalars spread(const AdamStep &step) {
    return {_mm512_set1_ps(step.beta1),
            _mm512_set1_ps(step.beta2),
            _mm512_set1_ps(step.one_minus_beta1),
            _mm512_set1_ps(step.one_minus_beta2),
            _mm512_set1_ps(step.inverse_root_bias2),
            _mm512_set1_ps(step.eps),
            _mm512_set1_ps(step.step_size),
            _mm512_set1_ps(step.decay),
            _mm512_set1_ps(step.grad_scale)};
}

LOWTIDE_AVX512 inline __m512 load_grad(const unsigned char *grad, Type type, std::size_t i) {
    if (type == Type::float32) {
        return _mm512_loadu_ps(grad + 4 * i);
    }
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(grad + 2 * i));
    if (type == Type::float16) {
        return _mm512_cvtph_ps(stored);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
}

LOWTIDE_AVX512 inline __m256i as_bfloat16(__m512 value) {
    // In integers: the instruction for this would flush subnormal numbers.
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(bfloat16_nan)));
}

LOWTIDE_AVX512 inline __m256i as_float16(__m512 value) {
    const __m256i rounded = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm256_mask_mov_epi16(rounded, is_nan, _mm256_set1_epi16(float16_nan));
}

// `streams`: past the caches, to an address that is a multiple of the vector's size.
LOWTIDE_AVX512 inline void store_low(unsigned char *low, Type type, std::size_t i, __m512 value,
                                     bool streams) {
    if (type == Type::float32) {
        auto *const place = reinterpret_cast<float *>(low + 4 * i);
        streams ? _mm512_stream_ps(place, value) : _mm512_storeu_ps(place, value);
        return;
    }
    auto *const place = reinterpret_cast<__m256i *>(low + 2 * i);
    const __m256i stored = type == Type::bfloat16 ? as_bfloat16(value) : as_float16(value);
    streams ? _mm256_stream_si256(place, stored) : _mm256_storeu_si256(place, stored);
}

// As updated_as_torch() in adam_element.hpp, operation by operation.
LOWTIDE_AVX512 inline Vectors updated_as_torch(const Scalars &s, Vectors e, __m512 grad) {
    const __m512 decayed = _mm512_mul_ps(e.param, s.decay);
    const __m512 away = _mm512_sub_ps(grad, e.exp_avg);
    e.exp_avg = _mm512_fmadd_ps(s.one_minus_beta1, away, e.exp_avg);
    const __m512 weighted = _mm512_mul_ps(s.one_minus_beta2, grad);
    e.exp_avg_sq = _mm512_mul_ps(e.exp_avg_sq, s.beta2);
    e.exp_avg_sq = _mm512_fmadd_ps(weighted, grad, e.exp_avg_sq);
    const __m512 root = _mm512_div_ps(_mm512_sqrt_ps(e.exp_avg_sq), s.inverse_root_bias2);
    const __m512 below = _mm512_add_ps(root, s.eps);
    const __m512 moved = _mm512_div_ps(_mm512_mul_ps(s.step_size, e.exp_avg), below);
    e.param = _mm512_add_ps(decayed, moved);
    return e;
}

// As updated() in adam_element.hpp in Order::vector, operation by operation.
LOWTIDE_AVX512 inline Vectors updated(const Scalars &s, Decay mode, Vectors e, __m512 grad) {
    if (mode == Decay::torch_decoupled) {
        return updated_as_torch(s, e, grad);
    }
    if (mode == Decay::l2) {
        grad = _mm512_fmadd_ps(e.param, s.decay, grad);
    }
    e.exp_avg = _mm512_mul_ps(e.exp_avg, s.beta1);
    e.exp_avg = _mm512_fmadd_ps(grad, s.one_minus_beta1, e.exp_avg);
    e.exp_avg_sq = _mm512_mul_ps(e.exp_avg_sq, s.beta2);
    const __m512 square = _mm512_mul_ps(grad, grad);
    e.exp_avg_sq = _mm512_fmadd_ps(square, s.one_minus_beta2, e.exp_avg_sq);
    const __m512 root = _mm512_sqrt_ps(e.exp_avg_sq);
    const __m512 below = _mm512_fmadd_ps(root, s.inverse_root_bias2, s.eps);
    const __m512 direction = _mm512_div_ps(e.exp_avg, below);
    if (mode == Decay::decoupled) {
        e.param = _mm512_fmadd_ps(e.param, s.decay, e.param);
    }
    e.param = _mm512_fmadd_ps(direction, s.step_size, e.param);
    return e;
}

} // namespace

LOWTIDE_AVX512
void adam_range_avx512(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
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
        const __m512 grad =
            _mm512_mul_ps(load_grad(a.grad.data(), a.grad_type, i), scalars.grad_scale);
        if (!a.kept_grad.empty()) {
            _mm512_storeu_ps(a.kept_grad.data() + i, grad);
        }
        for (const float *array : {param, exp_avg, exp_avg_sq}) {
            _mm_prefetch(ahead(array + i), _MM_HINT_T0);
        }
        const Vectors old{_mm512_loadu_ps(param + i), _mm512_loadu_ps(exp_avg + i),
                          _mm512_loadu_ps(exp_avg_sq + i)};
        const Vectors e = updated(scalars, mode, old, grad);
        _mm512_storeu_ps(param + i, e.param);
        _mm512_storeu_ps(exp_avg + i, e.exp_avg);
        _mm512_storeu_ps(exp_avg_sq + i, e.exp_avg_sq);
        if (!a.low.empty()) {
            store_low(a.low.data(), a.low_type, i, e.param, streams);
        }
    }
    _mm_sfence(); // no lock orders streamed stores for the thread that reads them
    adam_range_scalar(step, arrays, i, end);
}

} // namespace lowtide::offload
#endif // LOWTIDE_X86
