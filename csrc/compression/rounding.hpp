// Rounding without library calls, so that loops can be vectorised.
#pragma once

namespace lowtide::compression {

constexpr double code_limit = 1073741824.0; // 2^30: larger codes are not used

// Nearest integer, ties to even, for |x| < 2^51; for larger ones something at least as large as
// the limit of codes, for NaN NaN.
inline double round_even(double x) {
    constexpr double shift = 6755399441055744.0; // 1.5 * 2^52: its unit in the last place is 1
    return (x + shift) - shift;
}

} // namespace lowtide::compression
