#include "adam.hpp"

#include <stdexcept>

#include "common/cpu_features.hpp"
#include "common/default_arithmetic.hpp"
#include "common/thread_pool.hpp"

namespace lowtide::offload {
namespace {

// Ranges begin at multiples of this, so all vectors but the last are whole ones.
constexpr std::size_t range_align = 16;

float load_grad(const AdamArrays &arrays, std::size_t i) {
    const std::size_t offset = i * bytes_of(arrays.grad_type);
    if (arrays.grad_type == Type::float32) {
        return load<float>(arrays.grad, offset);
    }
    const auto stored = load<std::uint16_t>(arrays.grad, offset);
    return arrays.grad_type == Type::bfloat16 ? from_bfloat16(stored) : from_float16(stored);
}

void store_low(const AdamArrays &arrays, std::size_t i, float value) {
    const std::size_t offset = i * bytes_of(arrays.low_type);
    if (arrays.low_type == Type::float32) {
        store(arrays.low, offset, value);
    } else {
        store(arrays.low, offset,
              arrays.low_type == Type::bfloat16 ? to_bfloat16(value) : to_float16(value));
    }
}

template <Order order>
void update_range(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
                  std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
        const float grad = product(load_grad(arrays, i), step.grad_scale);
        if (!arrays.kept_grad.empty()) {
            arrays.kept_grad[i] = grad;
        }
        const AdamElement old{arrays.param[i], arrays.exp_avg[i], arrays.exp_avg_sq[i]};
        const AdamElement e = updated<order>(step, old, grad);
        arrays.param[i] = e.param;
        arrays.exp_avg[i] = e.exp_avg;
        arrays.exp_avg_sq[i] = e.exp_avg_sq;
        if (!arrays.low.empty()) {
            store_low(arrays, i, e.param);
        }
    }
}

using RangeKernel = void (*)(const AdamStep &, const AdamArrays &, std::size_t, std::size_t);

RangeKernel kernel_of(Level level) {
#if LOWTIDE_X86
    if (level == Level::avx512 && cpu_features().avx512) {
        return adam_range_avx512;
    }
    if (level == Level::avx2 && cpu_features().avx2) {
        return adam_range_avx2;
    }
#endif
    return level == Level::scalar ? adam_range_scalar : nullptr;
}

} // namespace

std::vector<Level> adam_levels() {
    std::vector<Level> levels;
    for (const Level level : {Level::scalar, Level::avx2, Level::avx512}) {
        if (kernel_of(level) != nullptr) {
            levels.push_back(level);
        }
    }
    return levels;
}

void adam_range_scalar(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
                       std::size_t end) {
    update_range<Order::vector>(step, arrays, begin, end);
}

void adam_update(const AdamStep &step, const AdamArrays &arrays, unsigned threads, Level level) {
    const RangeKernel kernel = kernel_of(level);
    if (kernel == nullptr) {
        throw std::runtime_error(std::string("adam_update: level '") + name_of(level) +
                                 "' cannot run on this processor; use one of adam_levels()");
    }
    if (arrays.tail > arrays.size()) {
        throw std::invalid_argument("adam_update: tail is longer than the arrays");
    }
    const std::size_t head = arrays.size() - arrays.tail;
    run_in_ranges(head, range_align, threads, [&](std::size_t begin, std::size_t end) {
        const DefaultArithmetic exact;
        kernel(step, arrays, begin, end);
    });
    const DefaultArithmetic exact;
    update_range<Order::contracted_loop>(step, arrays, head, arrays.size());
}

} // namespace lowtide::offload
