// Python face of the networks: checks only, the work happens with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/thread_pool.hpp"
#include "network.hpp"

namespace py = pybind11;

namespace {

using namespace lowtide::compression;
using lowtide::Span;

using Floats = py::array_t<float, py::array::c_style>;
using Indices = py::array_t<std::int32_t, py::array::c_style>;
using LayerArrays = std::tuple<std::string, Floats, Floats, Indices, Indices, Indices>;

template <typename T> Span<const T> span_of(const py::array_t<T, py::array::c_style> &array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

LayerKind kind_of(const std::string &name) {
    if (name == "affine") {
        return LayerKind::affine;
    }
    if (name == "divide" || name == "multiply") {
        return name == "divide" ? LayerKind::divide : LayerKind::multiply;
    }
    throw py::value_error("layers: kind '" + name +
                          "', allowed are 'affine', 'divide' and 'multiply'");
}

Layer layer_of(const LayerArrays &arrays) {
    const auto &[kind, weights, bias, offsets, sources, taps] = arrays;
    if (weights.ndim() != 3) {
        throw py::value_error("layers: weights have " + std::to_string(weights.ndim()) +
                              " axes, allowed are 3: tap, channel in, channel out");
    }
    if (weights.shape(2) != bias.size()) {
        throw py::value_error("layers: weights do not fit the bias");
    }
    return {kind_of(kind),    span_of(weights),
            span_of(bias),    static_cast<std::size_t>(weights.shape(1)),
            span_of(offsets), span_of(sources),
            span_of(taps)};
}

Floats run(const std::vector<LayerArrays> &arrays, const Floats &samples, long long size_out,
           long long threads, const std::string &level) {
    std::vector<Layer> layers;
    for (const LayerArrays &each : arrays) {
        layers.push_back(layer_of(each));
    }
    constexpr long long most_out = 1LL << 24;
    if (samples.ndim() != 2 || size_out < 1 || size_out > most_out) {
        throw py::value_error("samples: got " + std::to_string(samples.ndim()) + " axes for " +
                              std::to_string(size_out) +
                              " numbers each, allowed are 2, and 1 to 2^24");
    }
    if (threads < 1 || threads > lowtide::max_threads) {
        throw py::value_error("threads: got " + std::to_string(threads) + ", allowed is 1 to " +
                              std::to_string(lowtide::max_threads));
    }
    Floats results({samples.shape(0), static_cast<py::ssize_t>(size_out)});
    const Span<float> to(results.mutable_data(), static_cast<std::size_t>(results.size()));
    const auto count = static_cast<std::size_t>(samples.shape(0));
    const Span<const float> from = span_of(samples);
    if (count != 0) {
        const py::gil_scoped_release release;
        network_run(layers, count, from, to, static_cast<unsigned>(threads), level);
    }
    return results;
}

} // namespace

void bind_network(py::module_ &module) {
    module.def("network_run", &run, py::arg("layers"), py::arg("samples").noconvert(),
               py::arg("size_out"), py::arg("threads") = 1, py::arg("level") = "auto");
    module.def("network_levels", &network_levels,
               "Instruction sets that network_run can use here, slowest first.");
}
