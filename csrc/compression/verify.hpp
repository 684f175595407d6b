// Whether restored values keep a bound, in exact arithmetic, and the logarithmic domain's way back.
#pragma once

#include <cstdint>
#include <vector>

#include "common/span.hpp"

namespace lowtide::compression {

// Positions, rising, where not (both are finite and |restored - original| <= limit), for
// `is_relative` <= limit * |original|. T is float or double; no rounding decides.
template <typename T>
std::vector<std::int64_t> outside(Span<const T> original, Span<const T> restored, double limit,
                                  bool is_relative);

// 2^y by FORMAT.md, section 6: the same bits on every machine.
void exp2(Span<const double> y, Span<double> out);

} // namespace lowtide::compression
