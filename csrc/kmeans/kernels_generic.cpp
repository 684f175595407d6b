// Any processor: vectors of 16 bytes in the compiler's own notation. Without a fused multiply-add
// in the base instruction set a product is rounded before it is added, so that distances may
// differ from the other levels' in the last bits.
#include "pass.hpp"

#define LOWTIDE_KMEANS_LEVEL generic
#define LOWTIDE_KMEANS_TARGET
#include "kernels.hpp"

namespace lowtide::kmeans {
namespace generic {

#define OP LOWTIDE_KMEANS_INLINE static

using Floats = float __attribute__((vector_size(16)));
using Doubles = double __attribute__((vector_size(16)));
using Integers32 = std::int32_t __attribute__((vector_size(16)));
using Integers64 = std::int64_t __attribute__((vector_size(16)));

template <typename Element, typename Register, typename Integers> struct Vector {
    using T = Element;
    using R = Register;
    using Mask = Integers;
    static constexpr std::size_t width = sizeof(R) / sizeof(T);
    static constexpr int columns = columns_with(16);

    OP R load(const T *p) {
        R a;
        std::memcpy(&a, p, sizeof(a));
        return a;
    }
    OP void store(T *p, R a) { std::memcpy(p, &a, sizeof(a)); }
    OP R broadcast(T a) { return R{} + a; }
    OP T fma_one(T a, T b, T c) {
#ifdef __FP_FAST_FMA
        return std::fma(a, b, c);
#else
        return a * b + c; // compiled without contraction
#endif
    }
    OP R fma(R a, R b, R c) {
#ifdef __FP_FAST_FMA
        R result;
        for (std::size_t i = 0; i < width; ++i) {
            result[i] = std::fma(a[i], b[i], c[i]);
        }
        return result;
#else
        return a * b + c;
#endif
    }
    OP R add(R a, R b) { return a + b; }
    OP R subtract(R a, R b) { return a - b; }
    OP R multiply(R a, R b) { return a * b; }
    OP R min(R a, R b) { return a < b ? a : b; } // b if one is NaN
    OP R magnitude(R a) { return a < R{} ? -a : a; }
    OP Mask less(R a, R b) { return a < b; }
    OP R blend(Mask m, R yes, R no) { return m ? yes : no; }
    OP unsigned lanes(Mask m) {
        unsigned bits = 0;
        for (std::size_t i = 0; i < width; ++i) {
            bits |= (m[i] != 0 ? 1u : 0u) << i;
        }
        return bits;
    }
    OP unsigned differ(R a, R b) { return lanes(a != b); }
    OP unsigned not_within(R a, R b) { return lanes(~(a <= b)); }

    using Wide = Vector<double, Doubles, Integers64>;
    // Elements in float64; where `count` are fewer than a vector, the rest are zeros and not read.
    OP Doubles widened(const T *p, std::size_t count) {
        return Doubles{static_cast<double>(p[0]), count > 1 ? static_cast<double>(p[1]) : 0.0};
    }
    OP double total(R a) { return a[0] + a[1]; } // of float64
};

#undef OP

using Float = Vector<float, Floats, Integers32>;
using Double = Vector<double, Doubles, Integers64>;

} // namespace generic

template <> const Kernels<float> *kernels_generic() { return &generic::table<generic::Float>; }
template <> const Kernels<double> *kernels_generic() { return &generic::table<generic::Double>; }

} // namespace lowtide::kmeans
