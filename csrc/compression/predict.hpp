// Predictors: values to integer codes and back. Format: FORMAT.md, sections 3 and 4.
//
// Encoder and decoder run the same operations in the same order, so that they agree in every bit;
// the build forbids fused operations (-ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/span.hpp"
#include "scan.hpp"

namespace lowtide::compression {

struct Interpolation {
    std::vector<int> weights; // of the axes
    bool cubic;
    int alpha; // level bounds, as they stand in the record
    int beta;
};

// `work` and `restored` have shape.count elements, as have `codes`; T is float or double.
template <typename T>
void difference_encode(Span<const T> work, const Shape &shape, const std::vector<int> &orders,
                       double step, Span<std::int32_t> codes, Span<T> restored);

// Throws std::invalid_argument unless each axis has an order of 0 to 2.
void check_orders(const Shape &shape, const std::vector<int> &orders);

// Overwrites `codes`.
template <typename T>
void difference_decode(Span<std::int32_t> codes, const Shape &shape, const std::vector<int> &orders,
                       double step, Span<T> restored);

// Undoes differences where `is_predicted` is 0; there `predicted` does not count. Elsewhere a code
// is what the whole number differs by from `predicted`. Overwrites `codes`.
template <typename T>
void mixed_decode(Span<std::int32_t> codes, Span<const std::int32_t> predicted,
                  Span<const unsigned char> is_predicted, const Shape &shape,
                  const std::vector<int> &orders, double step, Span<T> restored);

template <typename T>
void interpolation_encode(Span<const T> work, const Shape &shape, const Interpolation &how,
                          double step, Span<std::int32_t> codes, Span<T> restored);

template <typename T>
void interpolation_decode(Span<const std::int32_t> codes, const Shape &shape,
                          const Interpolation &how, double step, Span<T> restored);

} // namespace lowtide::compression
