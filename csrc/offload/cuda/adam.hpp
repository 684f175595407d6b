// Adam on arrays in the memory of one GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "offload/adam_element.hpp"

namespace lowtide::offload {

// Addresses on the device, all of `count` elements, none overlapping another, except that
// `kept_grad` may be `grad` itself if that is float32.
struct AdamDeviceArrays {
    std::size_t count;
    float *param;
    float *exp_avg;
    float *exp_avg_sq;
    const void *grad;
    Type grad_type;
    void *low; // or nullptr: receives the new parameters as `low_type`
    Type low_type;
    float *kept_grad; // or nullptr: receives the gradient times grad_scale
    std::size_t tail; // so many of the last elements are updated in Order::contracted_loop
};

// Put the update on `stream` (a CUstream or cudaStream_t) of `device`, and return at once. Throws
// std::runtime_error when the runtime refuses; the calling thread's current device stays.
void adam_update_cuda(int device, std::uintptr_t stream, const AdamStep &step,
                      const AdamDeviceArrays &arrays);

} // namespace lowtide::offload
