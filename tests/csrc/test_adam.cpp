// Run under the sanitizers by tests/offload/test_adam_checks.py: arrays that end where they end,
// on every instruction set, with every type.
#include "offload/adam.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace {

using namespace lowtide::offload;
using lowtide::Span;

constexpr Type types[] = {Type::float32, Type::bfloat16, Type::float16};

struct Arrays {
    std::vector<float> param, exp_avg, exp_avg_sq, kept;
    std::vector<unsigned char> grad, low;

    Arrays(std::size_t count, Type grad_type, Type low_type)
        : param(count), exp_avg(count), exp_avg_sq(count), kept(count),
          grad(count * bytes_of(grad_type)), low(count * bytes_of(low_type)) {
        for (std::size_t i = 0; i < count; ++i) {
            param[i] = 0.01f * static_cast<float>(i) - 0.3f;
            exp_avg[i] = 0.02f * static_cast<float>(i % 7);
            exp_avg_sq[i] = 0.001f * static_cast<float>(i % 5);
        }
        for (std::size_t i = 0; i < grad.size(); ++i) { // small numbers in all three types
            grad[i] = static_cast<unsigned char>(i % 2 == 0 ? i : 0x30);
        }
    }

    AdamArrays views(Type grad_type, Type low_type, std::size_t tail) {
        AdamArrays views;
        views.param = Span<float>(param.data(), param.size());
        views.exp_avg = Span<float>(exp_avg.data(), exp_avg.size());
        views.exp_avg_sq = Span<float>(exp_avg_sq.data(), exp_avg_sq.size());
        views.grad = lowtide::ConstBytes(grad.data(), grad.size());
        views.grad_type = grad_type;
        views.low = lowtide::Bytes(low.data(), low.size());
        views.low_type = low_type;
        views.kept_grad = Span<float>(kept.data(), kept.size());
        views.tail = tail;
        return views;
    }

    bool operator==(const Arrays &other) const {
        return param == other.param && exp_avg == other.exp_avg && exp_avg_sq == other.exp_avg_sq &&
               kept == other.kept && low == other.low;
    }
};

constexpr AdamStep step_in(Decay mode) {
    return {0.9f, 0.99f, 0.1f, 0.01f, 1.7f, 1e-8f, -1e-3f, 0.01f, mode, 0.5f};
}

bool agrees_with_scalar(Level level, std::size_t count, Type grad_type, Type low_type) {
    Arrays expected(count, grad_type, low_type);
    Arrays found(count, grad_type, low_type);
    const std::size_t tail = count % 3;
    for (const Decay mode : {Decay::none, Decay::decoupled, Decay::l2}) {
        const AdamStep step = step_in(mode);
        adam_update(step, expected.views(grad_type, low_type, tail), 1, Level::scalar);
        adam_update(step, found.views(grad_type, low_type, tail), 3, level);
    }
    return expected == found;
}

} // namespace

int main() {
    int failures = 0;
    for (const Level level : adam_levels()) {
        for (const Type grad_type : types) {
            for (const Type low_type : types) {
                for (std::size_t count = 0; count < 70; ++count) {
                    failures += agrees_with_scalar(level, count, grad_type, low_type) ? 0 : 1;
                }
                failures += agrees_with_scalar(level, 70001, grad_type, low_type) ? 0 : 1;
            }
        }
    }
    if (failures != 0) {
        std::fprintf(stderr, "%d arrays differ\n", failures);
    }
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
