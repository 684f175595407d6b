// Python face of the simulator: checks only, the work happens with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "schedule.hpp"

namespace py = pybind11;

namespace {

using lowtide::offload::Job;
using lowtide::offload::LaneRates;
using lowtide::offload::Outcome;
using lowtide::offload::PathRates;
using lowtide::offload::Simulator;

using Pairs = std::vector<std::pair<double, double>>;

LaneRates rates_of(const std::vector<double> &values, const Pairs &paths) {
    if (values.size() != 9) {
        throw py::value_error("rates: got " + std::to_string(values.size()) +
                              " numbers, allowed are the 9 members of LaneRates in their order");
    }
    LaneRates rates;
    rates.host_to_device_bytes_per_s = values[0];
    rates.device_to_host_bytes_per_s = values[1];
    rates.is_duplex = values[2] != 0;
    rates.host_params_per_s = values[3];
    rates.downcast_params_per_s = values[4];
    rates.device_params_per_s = values[5];
    rates.launch_s = values[6];
    rates.host_memory_bytes_per_s = values[7];
    rates.host_update_bytes = values[8];
    for (const auto &[read, write] : paths) {
        rates.paths.push_back(PathRates{read, write});
    }
    return rates;
}

using Indices = std::vector<std::int32_t>;

py::tuple run(Simulator &simulator, Indices device_order, Indices host_order, Indices residents,
              std::int32_t slots, std::vector<double> release_s, Indices host_gates,
              Indices device_gates, std::uint32_t flags, Indices stored_order, std::int32_t buffers,
              std::int32_t carried, bool is_traced) {
    const Job job{std::move(device_order),
                  std::move(host_order),
                  std::move(residents),
                  slots,
                  std::move(release_s),
                  std::move(host_gates),
                  std::move(device_gates),
                  flags,
                  std::move(stored_order),
                  buffers,
                  carried};
    Outcome outcome;
    {
        const py::gil_scoped_release unlocked;
        outcome = simulator.run(job, is_traced);
    }
    py::list spans(outcome.spans.size());
    for (std::size_t i = 0; i < outcome.spans.size(); ++i) {
        const auto &span = outcome.spans[i];
        spans[i] = py::make_tuple(span.piece, span.lane, span.begin_s, span.end_s);
    }
    return py::make_tuple(outcome.makespan_s, outcome.host_end_s, outcome.device_end_s,
                          outcome.busy_s, spans);
}

} // namespace

void bind_schedule(py::module_ &module) {
    py::class_<Simulator>(module, "Simulator",
                          "Simulates plans of the same pieces at the same rates; "
                          "lowtide.offload.simulate has the words.")
        .def(
            py::init([](std::vector<double> numel, std::vector<double> upload_bytes,
                        std::vector<double> gradient_bytes, std::vector<double> resident_load_bytes,
                        Indices path, const std::vector<double> &rates, const Pairs &paths) {
                return Simulator({std::move(numel), std::move(upload_bytes),
                                  std::move(gradient_bytes), std::move(resident_load_bytes),
                                  std::move(path)},
                                 rates_of(rates, paths));
            }),
            py::arg("numel"), py::arg("upload_bytes"), py::arg("gradient_bytes"),
            py::arg("resident_load_bytes"), py::arg("path"), py::arg("rates"), py::arg("paths"))
        .def("run", &run, py::arg("device_order"), py::arg("host_order"), py::arg("residents"),
             py::arg("slots"), py::arg("release_s"), py::arg("host_gates"), py::arg("device_gates"),
             py::arg("flags"), py::arg("stored_order"), py::arg("buffers"), py::arg("carried"),
             py::arg("is_traced"),
             "(makespan_s, host_end_s, device_end_s, busy_s of all lanes, spans) of one plan.");
}
