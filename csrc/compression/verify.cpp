#include "verify.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

namespace lowtide::compression {
namespace {

// 113 bits hold the product of two doubles.
#if defined(__SIZEOF_FLOAT128__)
__extension__ typedef __float128 Wide;
#else
using Wide = long double;
static_assert(sizeof(long double) == 16, "a product of two doubles has to be exact");
#endif

// The decision for one pair, `a` restored and `b` original.
bool is_within(double a, double b, double limit, bool is_relative) {
    if (!std::isfinite(a) || !std::isfinite(b)) {
        return false;
    }
    const Wide allowed = is_relative ? Wide(limit) * Wide(std::fabs(b)) : Wide(limit);
    const double difference = a - b;
    if (!std::isfinite(difference)) { // so both are above 2^968: exact in 113 bits
        const Wide wide = Wide(a) - Wide(b);
        return (wide < 0 ? -wide : wide) <= allowed;
    }
    // The difference as a sum of two doubles without error (Dekker: the larger one first; Knuth's
    // way without the question overflows beside the largest double).
    const bool is_a_larger = std::fabs(a) >= std::fabs(b);
    const double larger = is_a_larger ? a : -b;
    const double smaller = is_a_larger ? -b : a;
    const double error = smaller - (difference - larger);
    // Exact where it matters: numbers within a factor of 2 of each other.
    const Wide left = allowed - Wide(std::fabs(difference));
    const double rest = difference < 0 ? -error : error;
    return left >= Wide(rest);
}

} // namespace

template <typename T>
std::vector<std::int64_t> outside(Span<const T> original, Span<const T> restored, double limit,
                                  bool is_relative) {
    if (original.size() != restored.size()) {
        throw std::invalid_argument("restored: got another number of values than original");
    }
    constexpr std::size_t block = 1024;
    // Far enough from the limit, rounding does not matter; most blocks are done with that.
    const double scale = limit * (1.0 - 0x1p-40);
    std::vector<std::int64_t> found;
    for (std::size_t begin = 0; begin < original.size(); begin += block) {
        const std::size_t end = std::min(begin + block, original.size());
        int doubtful = 0;
        for (std::size_t i = begin; i < end; ++i) {
            const auto x = static_cast<double>(original[i]);
            const double distance = std::fabs(static_cast<double>(restored[i]) - x);
            const double near = is_relative ? scale * std::fabs(x) : scale;
            doubtful |= static_cast<int>(!(distance < near)); // NaN and infinities too
        }
        if (doubtful == 0) {
            continue;
        }
        for (std::size_t i = begin; i < end; ++i) {
            if (!is_within(static_cast<double>(restored[i]), static_cast<double>(original[i]),
                           limit, is_relative)) {
                found.push_back(static_cast<std::int64_t>(i));
            }
        }
    }
    return found;
}

template std::vector<std::int64_t> outside<float>(Span<const float>, Span<const float>, double,
                                                  bool);
template std::vector<std::int64_t> outside<double>(Span<const double>, Span<const double>, double,
                                                   bool);

void exp2(Span<const double> y, Span<double> out) {
    constexpr int degree = 13;
    constexpr double ln2 = 0.6931471805599453;
    std::array<double, degree + 1> factor{};
    double factorial = 1.0; // exact up to 13!
    for (int k = 0; k <= degree; ++k) {
        factorial *= k == 0 ? 1.0 : k;
        factor[static_cast<std::size_t>(k)] = 1.0 / factorial;
    }
    for (std::size_t i = 0; i < y.size(); ++i) {
        const double n = std::floor(y[i] + 0.5);
        const double g = (y[i] - n) * ln2;
        double sum = factor[degree];
        for (int k = degree; k-- > 0;) {
            sum = sum * g + factor[static_cast<std::size_t>(k)];
        }
        const double exponent = std::clamp(n, -4000.0, 4000.0); // NaN stays, ldexp keeps it
        out[i] = std::isnan(sum) ? sum : std::ldexp(sum, static_cast<int>(exponent));
    }
}

} // namespace lowtide::compression
