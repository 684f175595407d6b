// Adam on one element: the arithmetic that every path of Lowtide's offload plugin repeats.
//
// The order of the operations, and which of them are fused, are those of the vector code of
// DeepSpeed's CPUAdam (0.19) or of torch's fused AdamW on a CPU, so the results are the same to the
// last bit. Each call below rounds once. Code that includes this file must be compiled without
// contraction (-ffp-contract=off,
// --fmad=false), or the compiler fuses more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LOWTIDE_HOST_DEVICE __host__ __device__
#else
#define LOWTIDE_HOST_DEVICE
#endif

namespace lowtide::offload {

// How a 16-bit or 32-bit element is stored.
enum class Type { float32, bfloat16, float16 };

LOWTIDE_HOST_DEVICE constexpr std::size_t bytes_of(Type type) {
    return type == Type::float32 ? 4 : 2;
}

// AdamW decays the parameter, Adam with L2 adds the decay to the gradient; all three in the order
// of CPUAdam. `torch_decoupled` is AdamW in the order of torch.
enum class Decay { none, decoupled, l2, torch_decoupled };

// The float32 scalars of one update; what they are made of is in plugins/lowtide/offload/adam.py.
struct AdamStep {
    float beta1;
    float beta2;
    float one_minus_beta1;
    float one_minus_beta2;
    float inverse_root_bias2; // 1 / sqrt(1 - beta2^t); torch divides: sqrt(1 - beta2^t) itself
    float eps;
    float step_size; // -lr / (1 - beta1^t)
    float decay;     // -lr * weight_decay if decoupled, weight_decay if l2, torch: 1 - lr * decay
    Decay mode;
    float grad_scale; // multiplied to the gradient before anything else
};

// CPUAdam leaves the elements after its last whole vector to a loop that says a * b + c * d. Where
// the compiler contracts (GCC's default), it fuses the first product, not the second as the vector
// code does. The moments then differ in the last bit now and then.
enum class Order { vector, contracted_loop };

struct AdamElement {
    float param;
    float exp_avg;
    float exp_avg_sq;
};

LOWTIDE_HOST_DEVICE inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

LOWTIDE_HOST_DEVICE inline float sum(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

LOWTIDE_HOST_DEVICE inline float fused(float a, float b, float c) { // a * b + c, rounded once
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

LOWTIDE_HOST_DEVICE inline float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

LOWTIDE_HOST_DEVICE inline float root(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

// old * beta + added * rest
template <Order order>
LOWTIDE_HOST_DEVICE inline float blended(float old, float beta, float added, float rest) {
    if constexpr (order == Order::contracted_loop) {
        return fused(old, beta, product(added, rest));
    } else {
        return fused(added, rest, product(old, beta));
    }
}

// AdamW as torch's vector code computes it where 1 - beta1 < 0.5. `grad` is scaled already.
LOWTIDE_HOST_DEVICE inline AdamElement updated_as_torch(const AdamStep &step, AdamElement e,
                                                        float grad) {
    const float decayed = product(e.param, step.decay);
    e.exp_avg = fused(step.one_minus_beta1, sum(grad, -e.exp_avg), e.exp_avg);
    const float weighted = product(step.one_minus_beta2, grad);
    e.exp_avg_sq = fused(weighted, grad, product(e.exp_avg_sq, step.beta2));
    const float below = sum(quotient(root(e.exp_avg_sq), step.inverse_root_bias2), step.eps);
    e.param = sum(decayed, quotient(product(step.step_size, e.exp_avg), below));
    return e;
}

// `grad` is scaled already.
template <Order order = Order::vector>
LOWTIDE_HOST_DEVICE inline AdamElement updated(const AdamStep &step, AdamElement e, float grad) {
    if (step.mode == Decay::torch_decoupled) {
        return updated_as_torch(step, e, grad);
    }
    if (step.mode == Decay::l2) {
        grad = fused(e.param, step.decay, grad);
    }
    const float square = product(grad, grad);
    e.exp_avg = blended<order>(e.exp_avg, step.beta1, grad, step.one_minus_beta1);
    e.exp_avg_sq = blended<order>(e.exp_avg_sq, step.beta2, square, step.one_minus_beta2);
    const float below = fused(root(e.exp_avg_sq), step.inverse_root_bias2, step.eps);
    const float direction = quotient(e.exp_avg, below);
    if (step.mode == Decay::decoupled) {
        e.param = fused(e.param, step.decay, e.param);
    }
    e.param = fused(direction, step.step_size, e.param);
    return e;
}

LOWTIDE_HOST_DEVICE inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

LOWTIDE_HOST_DEVICE inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

constexpr std::uint32_t infinity_bits = 0x7F800000u;
// The one NaN of 16-bit results: quiet, positive, without payload.
constexpr std::uint16_t bfloat16_nan = 0x7FC0u;
constexpr std::uint16_t float16_nan = 0x7E00u;

LOWTIDE_HOST_DEVICE inline float from_bfloat16(std::uint16_t stored) {
    return float_of(std::uint32_t{stored} << 16);
}

LOWTIDE_HOST_DEVICE inline std::uint16_t to_bfloat16(float value) { // to nearest, ties to even
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > infinity_bits) {
        return bfloat16_nan;
    }
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

LOWTIDE_HOST_DEVICE inline float from_float16(std::uint16_t stored) {
    const std::uint32_t sign = (stored & 0x8000u) << 16;
    const std::uint32_t rest = stored & 0x7FFFu;
    if (rest > 0x7C00u) {
        return float_of(sign | 0x7FC00000u | (rest & 0x3FFu) << 13);
    }
    if (rest == 0x7C00u) {
        return float_of(sign | infinity_bits);
    }
    if (rest >= 0x0400u) { // the exponents' biases differ by 112
        return float_of(sign | ((rest << 13) + (112u << 23)));
    }
    return float_of(sign | bits_of(product(static_cast<float>(rest), 0x1p-24f)));
}

LOWTIDE_HOST_DEVICE inline std::uint16_t to_float16(float value) { // to nearest, ties to even
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > infinity_bits) {
        return float16_nan;
    }
    if (magnitude >= bits_of(65520.0f)) { // halfway between the largest float16 and the next
        return static_cast<std::uint16_t>(sign | 0x7C00u);
    }
    if (magnitude >= bits_of(0x1p-14f)) {
        const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
        return static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
    }
    // One unit of a subnormal float16 is the last place of a float32 next to 0.5: the sum rounds.
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
}

} // namespace lowtide::offload
