// Adam on arrays in host memory, in one pass over them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "adam_element.hpp"
#include "common/span.hpp"

namespace lowtide::offload {

// All of the same number of elements, none overlapping another, except that `kept_grad` may be
// `grad` itself if that is float32.
struct AdamArrays {
    Span<float> param;      // read and written
    Span<float> exp_avg;    // read and written
    Span<float> exp_avg_sq; // read and written
    ConstBytes grad;
    Type grad_type = Type::float32;
    Bytes low; // if not empty: receives the new parameters as `low_type`
    Type low_type = Type::bfloat16;
    Span<float> kept_grad; // if not empty: receives the gradient times grad_scale

    std::size_t tail = 0; // so many of the last elements are updated in Order::contracted_loop

    std::size_t size() const { return param.size(); }
};

enum class Level { scalar, avx2, avx512 };

constexpr const char *name_of(Level level) {
    return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "scalar";
}

// What this processor and build can run, slowest first. All give the same bits.
std::vector<Level> adam_levels();

// Update every element with up to `threads` threads. The processor's rounding mode and its
// flushing of subnormal numbers do not matter. Throws std::runtime_error for a level that is not
// among adam_levels().
void adam_update(const AdamStep &step, const AdamArrays &arrays, unsigned threads, Level level);

// One range each, in Order::vector; what no whole vector covers is left to the scalar code.
void adam_range_scalar(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
                       std::size_t end);
void adam_range_avx2(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
                     std::size_t end);
void adam_range_avx512(const AdamStep &step, const AdamArrays &arrays, std::size_t begin,
                       std::size_t end);

} // namespace lowtide::offload
