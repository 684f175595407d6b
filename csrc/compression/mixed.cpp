#include <algorithm>

#include "predict.hpp"

namespace lowtide::compression {
namespace {

constexpr std::uint32_t factors[3][3] = {{1, 0, 0}, {1, 0u - 1, 0}, {1, 0u - 2, 1}};

// What the rows before add to the differences of a row, if its own elements were all 0: without
// the differences along the last axis, which come after. Unsigned: wraps around.
class RowsBefore {
  public:
    RowsBefore(const Shape &shape, const std::vector<int> &orders) : shape_(shape) {
        std::array<int, max_axes> order{};
        for (int axis = 0; axis < shape.axes; ++axis) {
            order[axis + max_axes - shape.axes] = orders[axis];
        }
        for (int a = 0; a <= order[0]; ++a) {
            for (int b = 0; b <= order[1]; ++b) {
                for (int c = 0; c <= order[2]; ++c) {
                    const std::uint32_t factor =
                        factors[order[0]][a] * factors[order[1]][b] * factors[order[2]][c];
                    if (a + b + c != 0) {
                        terms_.push_back({{a, b, c}, factor});
                    }
                }
            }
        }
    }

    void sum(const Row &row, const std::uint32_t *values, std::vector<std::uint32_t> &sums) const {
        std::fill(sums.begin(), sums.end(), 0);
        for (const Term &term : terms_) {
            std::size_t back = 0;
            bool is_there = true;
            for (int axis = 0; axis < max_axes - 1; ++axis) {
                is_there = is_there && row.at[axis] >= static_cast<std::size_t>(term.back[axis]);
                back += static_cast<std::size_t>(term.back[axis]) * shape_.stride[axis];
            }
            if (is_there) {
                const std::uint32_t *before = values + row.base - back;
                for (std::size_t i = 0; i < sums.size(); ++i) {
                    sums[i] += term.factor * before[i];
                }
            }
        }
    }

  private:
    struct Term {
        std::array<int, max_axes - 1> back; // rows, on each axis
        std::uint32_t factor;
    };

    const Shape &shape_;
    std::vector<Term> terms_;
};

// One row: `sums` of the rows before become those with the row itself.
void restore_row(std::uint32_t *codes, const std::int32_t *predicted,
                 const unsigned char *is_predicted, int order, std::vector<std::uint32_t> &sums) {
    std::uint32_t last = 0, last_but_one = 0;
    for (std::size_t i = 0; i < sums.size(); ++i) {
        if (is_predicted[i] != 0) {
            codes[i] += static_cast<std::uint32_t>(predicted[i]);
            sums[i] += codes[i];
        } else {
            const std::uint32_t sum =
                codes[i] - factors[order][1] * last - factors[order][2] * last_but_one;
            codes[i] = sum - sums[i];
            sums[i] = sum;
        }
        last_but_one = last;
        last = sums[i];
    }
}

} // namespace

template <typename T>
void mixed_decode(Span<std::int32_t> codes, Span<const std::int32_t> predicted,
                  Span<const unsigned char> is_predicted, const Shape &shape,
                  const std::vector<int> &orders, double step, Span<T> restored) {
    check_orders(shape, orders);
    auto *bits = reinterpret_cast<std::uint32_t *>(codes.data());
    const RowsBefore before(shape, orders);
    std::vector<std::uint32_t> sums(shape.length[max_axes - 1]);
    Pass all;
    all.points = shape.length;
    for_each_row(shape, all, [&](const Row &row) {
        before.sum(row, bits, sums);
        restore_row(bits + row.base, predicted.data() + row.base, is_predicted.data() + row.base,
                    orders.back(), sums);
    });
    for (std::size_t i = 0; i < shape.count; ++i) {
        restored[i] = static_cast<T>(static_cast<double>(codes[i]) * step);
    }
}

#define LOWTIDE_MIXED(T)                                                                           \
    template void mixed_decode<T>(Span<std::int32_t>, Span<const std::int32_t>,                    \
                                  Span<const unsigned char>, const Shape &,                        \
                                  const std::vector<int> &, double, Span<T>);
LOWTIDE_MIXED(float)
LOWTIDE_MIXED(double)

} // namespace lowtide::compression
