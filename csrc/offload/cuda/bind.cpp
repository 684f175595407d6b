// Python face of csrc/offload/cuda: checks only, the launch happens with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>

#include "adam.hpp"
#include "offload/adam_arguments.hpp"

namespace py = pybind11;

namespace {

using namespace lowtide::offload;

AdamStep step_argument(const std::map<std::string, float> &scalars, const std::string &mode) {
    const auto value = [&scalars](const char *name) {
        const auto found = scalars.find(name);
        if (found == scalars.end()) {
            throw py::value_error(std::string("step: got no '") + name +
                                  "'; pass AdamStep.scalars() and grad_scale");
        }
        return found->second;
    };
    return {value("beta1"),
            value("beta2"),
            value("one_minus_beta1"),
            value("one_minus_beta2"),
            value("inverse_root_bias2"),
            value("eps"),
            value("step_size"),
            value("decay"),
            decay_argument(mode),
            value("grad_scale")};
}

template <typename T> T *pointer(std::uintptr_t address) { return reinterpret_cast<T *>(address); }

void update(int device, std::uintptr_t stream, long long count,
            const std::map<std::string, float> &step, const std::string &mode, std::uintptr_t param,
            std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, std::uintptr_t grad,
            const std::string &grad_type, std::uintptr_t low_precision, const std::string &low_type,
            std::uintptr_t kept_grad, long long tail) {
    const std::size_t n = count_argument(count);
    const Type grad_is = type_argument(grad_type, "grad");
    const Type low_is = type_argument(low_type, "low_precision");
    check_all({{{"param", param, Type::float32},
                {"exp_avg", exp_avg, Type::float32},
                {"exp_avg_sq", exp_avg_sq, Type::float32},
                {"grad", grad, grad_is},
                {"low_precision", low_precision, low_is},
                {"kept_grad", kept_grad, Type::float32}}},
              n);
    const AdamDeviceArrays arrays{n,
                                  pointer<float>(param),
                                  pointer<float>(exp_avg),
                                  pointer<float>(exp_avg_sq),
                                  pointer<const void>(grad),
                                  grad_is,
                                  pointer<void>(low_precision),
                                  low_is,
                                  pointer<float>(kept_grad),
                                  tail_argument(tail, n)};
    const AdamStep scalars = step_argument(step, mode);
    const py::gil_scoped_release unlocked;
    adam_update_cuda(device, stream, scalars, arrays);
}

} // namespace

void bind_cuda_offload(py::module_ &module) {
    module.def("adam_update", &update, py::arg("device"), py::arg("stream"), py::arg("count"),
               py::kw_only(), py::arg("step"), py::arg("mode"), py::arg("param"),
               py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("grad"), py::arg("grad_type"),
               py::arg("low_precision") = 0, py::arg("low_type") = "bfloat16",
               py::arg("kept_grad") = 0, py::arg("tail") = 0,
               "One Adam update of `count` elements, put on a stream given as its handle. Arrays "
               "are addresses on the device, float32 unless a type is given; 0 leaves "
               "low_precision or kept_grad out. RuntimeError if the launch is refused.");
}
