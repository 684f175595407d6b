#include "adam.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lowtide::offload {
namespace {

constexpr int threads_per_block = 256;
constexpr unsigned blocks_per_processor = 8; // 2048 threads: as many as can be resident
constexpr std::size_t group = 4;             // elements that one thread loads at once

struct alignas(8) FourHalves {
    std::uint16_t at[group];
};
struct alignas(16) FourFloats {
    float at[group];
};

__device__ float wide(Type type, const void *array, std::size_t i) {
    if (type == Type::float32) {
        return static_cast<const float *>(array)[i];
    }
    const std::uint16_t stored = static_cast<const std::uint16_t *>(array)[i];
    return type == Type::bfloat16 ? from_bfloat16(stored) : from_float16(stored);
}

__device__ std::uint16_t narrow(Type type, float value) {
    return type == Type::bfloat16 ? to_bfloat16(value) : to_float16(value);
}

template <Order order>
__device__ void update_one(const AdamStep &step, const AdamDeviceArrays &a, std::size_t i) {
    const float grad = product(wide(a.grad_type, a.grad, i), step.grad_scale);
    if (a.kept_grad != nullptr) {
        a.kept_grad[i] = grad;
    }
    const AdamElement e = updated<order>(step, {a.param[i], a.exp_avg[i], a.exp_avg_sq[i]}, grad);
    a.param[i] = e.param;
    a.exp_avg[i] = e.exp_avg;
    a.exp_avg_sq[i] = e.exp_avg_sq;
    if (a.low != nullptr && a.low_type == Type::float32) {
        static_cast<float *>(a.low)[i] = e.param;
    } else if (a.low != nullptr) {
        static_cast<std::uint16_t *>(a.low)[i] = narrow(a.low_type, e.param);
    }
}

__device__ FourFloats load_four(const float *array, std::size_t i) {
    return *reinterpret_cast<const FourFloats *>(array + i);
}

__device__ void store_four(float *array, std::size_t i, const FourFloats &values) {
    *reinterpret_cast<FourFloats *>(array + i) = values;
}

__device__ FourFloats load_four_grads(Type type, const void *array, std::size_t i) {
    if (type == Type::float32) {
        return load_four(static_cast<const float *>(array), i);
    }
    const auto *first = static_cast<const std::uint16_t *>(array) + i;
    const FourHalves stored = *reinterpret_cast<const FourHalves *>(first);
    FourFloats values;
    for (std::size_t k = 0; k < group; ++k) {
        values.at[k] =
            type == Type::bfloat16 ? from_bfloat16(stored.at[k]) : from_float16(stored.at[k]);
    }
    return values;
}

__device__ void store_four_low(Type type, void *array, std::size_t i, const FourFloats &values) {
    if (type == Type::float32) {
        store_four(static_cast<float *>(array), i, values);
        return;
    }
    FourHalves stored;
    for (std::size_t k = 0; k < group; ++k) {
        stored.at[k] = narrow(type, values.at[k]);
    }
    auto *first = static_cast<std::uint16_t *>(array) + i;
    *reinterpret_cast<FourHalves *>(first) = stored;
}

// Elements i to i + 3, by loads and stores of four at once.
__device__ void update_four(const AdamStep &step, const AdamDeviceArrays &a, std::size_t i) {
    FourFloats param = load_four(a.param, i);
    FourFloats exp_avg = load_four(a.exp_avg, i);
    FourFloats exp_avg_sq = load_four(a.exp_avg_sq, i);
    FourFloats grad = load_four_grads(a.grad_type, a.grad, i);
    for (std::size_t k = 0; k < group; ++k) {
        grad.at[k] = product(grad.at[k], step.grad_scale);
        const AdamElement e =
            updated(step, {param.at[k], exp_avg.at[k], exp_avg_sq.at[k]}, grad.at[k]);
        param.at[k] = e.param;
        exp_avg.at[k] = e.exp_avg;
        exp_avg_sq.at[k] = e.exp_avg_sq;
    }
    store_four(a.param, i, param);
    store_four(a.exp_avg, i, exp_avg);
    store_four(a.exp_avg_sq, i, exp_avg_sq);
    if (a.kept_grad != nullptr) {
        store_four(a.kept_grad, i, grad);
    }
    if (a.low != nullptr) {
        store_four_low(a.low_type, a.low, i, param);
    }
}

// The first `grouped` elements, a multiple of four, four at a time; then the others.
__global__ void __launch_bounds__(threads_per_block)
    update_adam_kernel(AdamStep step, AdamDeviceArrays a, std::size_t grouped) {
    const std::size_t thread = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const std::size_t threads = std::size_t{gridDim.x} * blockDim.x;
    for (std::size_t i = thread; i < grouped / group; i += threads) {
        update_four(step, a, i * group);
    }
    const std::size_t head = a.count - a.tail;
    for (std::size_t i = grouped + thread; i < head; i += threads) {
        update_one<Order::vector>(step, a, i);
    }
    for (std::size_t i = head + thread; i < a.count; i += threads) {
        update_one<Order::contracted_loop>(step, a, i);
    }
}

void check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("adam_update on the GPU: ") + what + ": " +
                                 cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
    }
}

// Makes `device` the calling thread's current one while it lives.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~CurrentDevice() { static_cast<void>(cudaSetDevice(before_)); }

    CurrentDevice(const CurrentDevice &) = delete;
    CurrentDevice &operator=(const CurrentDevice &) = delete;

  private:
    int before_ = 0;
};

bool is_aligned(const void *array, Type type) { // also true for nullptr
    return reinterpret_cast<std::uintptr_t>(array) % (group * bytes_of(type)) == 0;
}

} // namespace

void adam_update_cuda(int device, std::uintptr_t stream, const AdamStep &step,
                      const AdamDeviceArrays &a) {
    if (a.count == 0) {
        return;
    }
    const CurrentDevice current(device);
    const bool groups =
        is_aligned(a.param, Type::float32) && is_aligned(a.exp_avg, Type::float32) &&
        is_aligned(a.exp_avg_sq, Type::float32) && is_aligned(a.grad, a.grad_type) &&
        is_aligned(a.low, a.low_type) && is_aligned(a.kept_grad, Type::float32);
    const std::size_t grouped = groups ? (a.count - a.tail) / group * group : 0;
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    const std::size_t pieces = groups ? std::max(grouped / group, a.count - grouped) : a.count;
    const std::size_t blocks =
        std::min<std::size_t>((pieces + threads_per_block - 1) / threads_per_block,
                              static_cast<std::size_t>(processors) * blocks_per_processor);
    update_adam_kernel<<<static_cast<unsigned>(blocks), threads_per_block, 0,
                         reinterpret_cast<cudaStream_t>(stream)>>>(step, a, grouped);
    check(cudaGetLastError(), "launch");
}

} // namespace lowtide::offload
