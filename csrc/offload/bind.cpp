// Python face of csrc/offload: checks only, the work happens with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "adam.hpp"
#include "adam_arguments.hpp"
#include "common/thread_pool.hpp"

namespace py = pybind11;

void bind_schedule(py::module_ &module);

namespace {

using namespace lowtide::offload;

Level level_argument(const std::string &text) {
    const std::vector<Level> levels = adam_levels();
    if (text == "auto") {
        return levels.back();
    }
    for (const Level level : {Level::scalar, Level::avx2, Level::avx512}) {
        if (text == name_of(level)) {
            return level; // adam_update refuses one that cannot run
        }
    }
    throw py::value_error("level: got '" + text +
                          "', allowed is 'auto', 'scalar', 'avx2' or 'avx512'");
}

unsigned threads_argument(long long threads) {
    if (threads < 1 || threads > lowtide::max_threads) {
        throw py::value_error("threads: got " + std::to_string(threads) + ", allowed is 1 to " +
                              std::to_string(lowtide::max_threads));
    }
    return static_cast<unsigned>(threads);
}

AdamStep make_step(float beta1, float beta2, float one_minus_beta1, float one_minus_beta2,
                   float inverse_root_bias2, float eps, float step_size, float decay,
                   const std::string &mode, float grad_scale) {
    return {beta1, beta2,     one_minus_beta1, one_minus_beta2,      inverse_root_bias2,
            eps,   step_size, decay,           decay_argument(mode), grad_scale};
}

template <typename T> lowtide::Span<T> span_of(const ArrayArgument &array, std::size_t count) {
    const std::size_t size = array.address == 0 ? 0 : count * bytes_of(array.type) / sizeof(T);
    return {reinterpret_cast<T *>(array.address), size};
}

void update(const AdamStep &step, long long count, std::uintptr_t param, std::uintptr_t exp_avg,
            std::uintptr_t exp_avg_sq, std::uintptr_t grad, const std::string &grad_type,
            std::uintptr_t low_precision, const std::string &low_type, std::uintptr_t kept_grad,
            long long tail, long long threads, const std::string &level) {
    const std::size_t n = count_argument(count);
    const Type grad_is = type_argument(grad_type, "grad");
    const Type low_is = type_argument(low_type, "low_precision");
    const AllArrays all{{{"param", param, Type::float32},
                         {"exp_avg", exp_avg, Type::float32},
                         {"exp_avg_sq", exp_avg_sq, Type::float32},
                         {"grad", grad, grad_is},
                         {"low_precision", low_precision, low_is},
                         {"kept_grad", kept_grad, Type::float32}}};
    check_all(all, n);
    const unsigned workers = threads_argument(threads);
    const Level chosen = level_argument(level);
    AdamArrays arrays;
    arrays.param = span_of<float>(all[0], n);
    arrays.exp_avg = span_of<float>(all[1], n);
    arrays.exp_avg_sq = span_of<float>(all[2], n);
    arrays.grad = span_of<const unsigned char>(all[3], n);
    arrays.grad_type = grad_is;
    arrays.low = span_of<unsigned char>(all[4], n);
    arrays.low_type = low_is;
    arrays.kept_grad = span_of<float>(all[5], n);
    arrays.tail = tail_argument(tail, n);
    const py::gil_scoped_release unlocked;
    adam_update(step, arrays, workers, chosen);
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Level level : adam_levels()) {
        names.emplace_back(name_of(level));
    }
    return names;
}

void bind_adam(py::module_ &module) {
    py::class_<AdamStep>(module, "AdamStep", "The float32 scalars of one update.")
        .def(py::init(&make_step), py::kw_only(), py::arg("beta1"), py::arg("beta2"),
             py::arg("one_minus_beta1"), py::arg("one_minus_beta2"), py::arg("inverse_root_bias2"),
             py::arg("eps"), py::arg("step_size"), py::arg("decay"), py::arg("mode"),
             py::arg("grad_scale"));
    module.def("adam_update", &update, py::arg("step"), py::arg("count"), py::kw_only(),
               py::arg("param"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("grad"),
               py::arg("grad_type"), py::arg("low_precision") = 0, py::arg("low_type") = "bfloat16",
               py::arg("kept_grad") = 0, py::arg("tail") = 0, py::arg("threads") = 1,
               py::arg("level") = "auto",
               "One Adam update of `count` elements. Arrays are addresses in host memory, float32 "
               "unless a type is given; 0 leaves low_precision or kept_grad out. The last `tail` "
               "elements are computed as CPUAdam's scalar loop does.");
    module.def("adam_levels", &level_names,
               "Instruction sets that adam_update can use here, slowest first.");
}

} // namespace

void bind_offload(py::module_ &module) {
    bind_adam(module);
    bind_schedule(module);
}
