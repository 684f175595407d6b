// Python face of csrc/compression: checks only, the work happens with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/buffer.hpp"
#include "entropy.hpp"
#include "predict.hpp"
#include "verify.hpp"

namespace py = pybind11;

void bind_network(py::module_ &module);

namespace {

using namespace lowtide::compression;
using lowtide::Span;

template <typename T> using Array = py::array_t<T, py::array::c_style>;
using Lengths = std::vector<std::size_t>;
using Orders = std::vector<int>; // or weights, one for each axis

template <typename T> Array<T> empty(std::size_t count) {
    return Array<T>(static_cast<py::ssize_t>(count));
}

template <typename T> Span<T> writable(Array<T> &array) {
    return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

template <typename T>
Span<const T> values(const Array<T> &array, const Shape &shape, const char *name) {
    const auto size = static_cast<std::size_t>(array.size());
    if (size != shape.count) {
        throw py::value_error(std::string(name) + ": got " + std::to_string(size) +
                              " elements, the shape has " + std::to_string(shape.count));
    }
    return {array.data(), size};
}

void check_step(double step) {
    if (!(step > 0.0) || !std::isfinite(step) || !std::isfinite(1.0 / step)) {
        throw py::value_error("step: got " + std::to_string(step) +
                              ", allowed are positive numbers with a finite inverse");
    }
}

// Codes and restored values, by encode(work, shape, codes, restored) without the GIL.
template <typename T, typename Encode>
std::pair<Array<std::int32_t>, Array<T>> encoded(const Array<T> &work, const Lengths &lengths,
                                                 double step, const Encode &encode) {
    const Shape shape(lengths);
    const Span<const T> from = values(work, shape, "work");
    check_step(step);
    auto codes = empty<std::int32_t>(shape.count);
    auto restored = empty<T>(shape.count);
    const auto to_codes = writable(codes);
    const auto to_restored = writable(restored);
    {
        const py::gil_scoped_release release;
        encode(from, shape, to_codes, to_restored);
    }
    return {std::move(codes), std::move(restored)};
}

// Restored values, by decode(restored) without the GIL.
template <typename T, typename Decode> py::object decoded(std::size_t count, const Decode &decode) {
    auto restored = empty<T>(count);
    const auto to = writable(restored);
    {
        const py::gil_scoped_release release;
        decode(to);
    }
    return std::move(restored);
}

template <typename Decode>
py::object decoded_as(bool is_double, std::size_t count, const Decode &decode) {
    return is_double ? decoded<double>(count, decode) : decoded<float>(count, decode);
}

template <typename T>
std::pair<Array<std::int32_t>, Array<T>> encode_differences(const Array<T> &work,
                                                            const Lengths &lengths,
                                                            const Orders &orders, double step) {
    return encoded(work, lengths, step,
                   [&](auto from, const Shape &shape, auto codes, auto restored) {
                       difference_encode<T>(from, shape, orders, step, codes, restored);
                   });
}

py::object difference_decode_any(Array<std::int32_t> codes, const Lengths &lengths,
                                 const Orders &orders, double step, bool is_double) {
    const Shape shape(lengths);
    values(codes, shape, "codes");
    check_step(step);
    const auto from = writable(codes);
    return decoded_as(is_double, shape.count,
                      [&](auto to) { difference_decode(from, shape, orders, step, to); });
}

py::object mixed_decode_any(Array<std::int32_t> codes, const Array<std::int32_t> &predicted,
                            const Array<unsigned char> &is_predicted, const Lengths &lengths,
                            const Orders &orders, double step, bool is_double) {
    const Shape shape(lengths);
    values(codes, shape, "codes");
    const auto other = values(predicted, shape, "predicted");
    const auto mask = values(is_predicted, shape, "is_predicted");
    check_step(step);
    const auto from = writable(codes);
    return decoded_as(is_double, shape.count,
                      [&](auto to) { mixed_decode(from, other, mask, shape, orders, step, to); });
}

template <typename T>
std::pair<Array<std::int32_t>, Array<T>>
encode_interpolation(const Array<T> &work, const Lengths &lengths, const Orders &weights,
                     bool cubic, int alpha, int beta, double step) {
    const Interpolation how{weights, cubic, alpha, beta};
    return encoded(work, lengths, step,
                   [&](auto from, const Shape &shape, auto codes, auto restored) {
                       interpolation_encode<T>(from, shape, how, step, codes, restored);
                   });
}

py::object interpolation_decode_any(const Array<std::int32_t> &codes, const Lengths &lengths,
                                    const Orders &weights, bool cubic, int alpha, int beta,
                                    double step, bool is_double) {
    const Shape shape(lengths);
    const auto from = values(codes, shape, "codes");
    check_step(step);
    const Interpolation how{weights, cubic, alpha, beta};
    return decoded_as(is_double, shape.count,
                      [&](auto to) { interpolation_decode(from, shape, how, step, to); });
}

std::vector<Pass> scan_of(const Shape &shape, const std::optional<Orders> &weights) {
    return weights ? scan_of_interpolation(shape, *weights) : scan_of_differences(shape);
}

py::bytes encode_entropy(const Array<std::int32_t> &codes, const Lengths &lengths,
                         const std::optional<Orders> &weights) {
    const Shape shape(lengths);
    const auto from = values(codes, shape, "codes");
    std::vector<unsigned char> section;
    {
        const py::gil_scoped_release release;
        section = entropy_encode(from, shape, scan_of(shape, weights));
    }
    return {reinterpret_cast<const char *>(section.data()), section.size()};
}

Array<std::int32_t> decode_entropy(const py::object &section, const Lengths &lengths,
                                   const std::optional<Orders> &weights) {
    const lowtide::ReadBuffer buffer(section, "section");
    const Shape shape(lengths);
    auto codes = empty<std::int32_t>(shape.count);
    const auto to = writable(codes);
    {
        const py::gil_scoped_release release;
        entropy_decode(buffer.bytes(), shape, scan_of(shape, weights), to);
    }
    return codes;
}

template <typename T>
Array<std::int64_t> positions_outside(const Array<T> &original, const Array<T> &restored,
                                      double limit, bool is_relative) {
    const Span<const T> a{original.data(), static_cast<std::size_t>(original.size())};
    const Span<const T> b{restored.data(), static_cast<std::size_t>(restored.size())};
    std::vector<std::int64_t> found;
    {
        const py::gil_scoped_release release;
        found = outside<T>(a, b, limit, is_relative);
    }
    auto positions = empty<std::int64_t>(found.size());
    std::copy(found.begin(), found.end(), positions.mutable_data());
    return positions;
}

Array<double> exp2_of(const Array<double> &y) {
    auto out = empty<double>(static_cast<std::size_t>(y.size()));
    const Span<const double> from{y.data(), static_cast<std::size_t>(y.size())};
    const auto to = writable(out);
    {
        const py::gil_scoped_release release;
        lowtide::compression::exp2(from, to);
    }
    return out;
}

double cost_of(const Array<std::int32_t> &codes) {
    const Span<const std::int32_t> from{codes.data(), static_cast<std::size_t>(codes.size())};
    const py::gil_scoped_release release;
    return cost_bits(from);
}

template <typename T> void bind_values(py::module_ &module) {
    module.def("difference_encode", &encode_differences<T>, py::arg("work").noconvert(),
               py::arg("shape"), py::arg("orders"), py::arg("step"));
    module.def("interpolation_encode", &encode_interpolation<T>, py::arg("work").noconvert(),
               py::arg("shape"), py::arg("weights"), py::arg("cubic"), py::arg("alpha"),
               py::arg("beta"), py::arg("step"));
    module.def("outside", &positions_outside<T>, py::arg("original").noconvert(),
               py::arg("restored").noconvert(), py::arg("limit"), py::arg("is_relative"));
}

} // namespace

void bind_compression(py::module_ &module) {
    module.doc() = "Primitives of the codecs lowtide.sz and lowtide.aesz; see lowtide.compression.";
    bind_values<float>(module);
    bind_values<double>(module);
    module.def("difference_decode", &difference_decode_any, py::arg("codes").noconvert(),
               py::arg("shape"), py::arg("orders"), py::arg("step"), py::arg("is_double"));
    module.def("mixed_decode", &mixed_decode_any, py::arg("codes").noconvert(),
               py::arg("predicted").noconvert(), py::arg("is_predicted").noconvert(),
               py::arg("shape"), py::arg("orders"), py::arg("step"), py::arg("is_double"));
    module.def("interpolation_decode", &interpolation_decode_any, py::arg("codes").noconvert(),
               py::arg("shape"), py::arg("weights"), py::arg("cubic"), py::arg("alpha"),
               py::arg("beta"), py::arg("step"), py::arg("is_double"));
    module.def("entropy_encode", &encode_entropy, py::arg("codes").noconvert(), py::arg("shape"),
               py::arg("weights"));
    module.def("entropy_decode", &decode_entropy, py::arg("section"), py::arg("shape"),
               py::arg("weights"));
    module.def("exp2", &exp2_of, py::arg("y").noconvert());
    module.def("cost_bits", &cost_of, py::arg("codes").noconvert());
    bind_network(module);
}
