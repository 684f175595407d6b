// Python face of csrc/kmeans: checks only, the work happens with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "assign.hpp"
#include "common/default_arithmetic.hpp"
#include "common/thread_pool.hpp"

namespace py = pybind11;

namespace {

using namespace lowtide::kmeans;
using lowtide::Span;

template <typename T> using Array = py::array_t<T, py::array::c_style>;

template <typename T, std::size_t count>
T named(const std::string &text, const std::pair<const char *, T> (&known)[count],
        const char *what) {
    std::string allowed;
    for (const auto &[name, value] : known) {
        if (text == name) {
            return value;
        }
        allowed += std::string(allowed.empty() ? "'" : ", '") + name + "'";
    }
    throw py::value_error(std::string(what) + ": got '" + text + "', allowed is " + allowed);
}

constexpr std::pair<const char *, Mode> modes[] = {{"off", Mode::off},
                                                   {"detect", Mode::detect},
                                                   {"correct", Mode::correct},
                                                   {"recompute", Mode::recompute}};
constexpr std::pair<const char *, Level> all_levels[] = {
    {"generic", Level::generic}, {"avx2", Level::avx2}, {"avx512", Level::avx512}};
constexpr std::pair<const char *, Site> sites[] = {{"acc", Site::acc},
                                                   {"checksum", Site::checksum},
                                                   {"best", Site::best},
                                                   {"index", Site::index},
                                                   {"best_again", Site::best_again},
                                                   {"sum", Site::sum},
                                                   {"count", Site::count},
                                                   {"norm", Site::norm}};

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const auto &[name, level] : all_levels) {
        if (kernels_of<float>(level) != nullptr) {
            names.emplace_back(name);
        }
    }
    return names;
}

Level level_argument(const std::string &text) {
    return named(text == "auto" ? levels().back() : text, all_levels, "level");
}

unsigned threads_argument(long long threads) {
    if (threads < 1 || threads > lowtide::max_threads) {
        throw py::value_error("threads: got " + std::to_string(threads) + ", allowed is 1 to " +
                              std::to_string(lowtide::max_threads));
    }
    return static_cast<unsigned>(threads);
}

// (site, row, column, bit), sorted by row.
using FaultArgument = std::tuple<std::string, std::size_t, std::size_t, unsigned>;

std::vector<Fault> faults_argument(const std::vector<FaultArgument> &asked) {
    std::vector<Fault> faults;
    for (const auto &[site, row, column, bit] : asked) {
        Fault fault;
        fault.site = named(site, sites, "faults");
        fault.row = row;
        fault.column = column;
        fault.bit = bit;
        faults.push_back(fault);
    }
    const auto earlier = [](const Fault &a, const Fault &b) { return a.row < b.row; };
    if (!std::is_sorted(faults.begin(), faults.end(), earlier)) {
        throw py::value_error("faults: got rows that are not in order; sort them");
    }
    return faults;
}

template <typename T> void check_shape(const Array<T> &array, const char *name) {
    if (array.ndim() != 2) {
        throw py::value_error(std::string(name) + ": got " + std::to_string(array.ndim()) +
                              " dimensions, allowed are 2: rows and features");
    }
}

template <typename T> Span<const T> values(const Array<T> &array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <typename T> Span<T> writable(Array<T> &array) {
    return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

// Samples made ready, and the arrays that they look into.
template <typename T> class PreparedSamples {
  public:
    PreparedSamples(Array<T> rows, std::optional<Array<double>> weights, const std::string &level,
                    long long threads)
        : rows_(std::move(rows)), weights_(std::move(weights)) {
        check_shape(rows_, "samples");
        if (weights_ && weights_->size() != rows_.shape(0)) {
            throw py::value_error("weights: got " + std::to_string(weights_->size()) +
                                  ", allowed is one for each of the " +
                                  std::to_string(rows_.shape(0)) + " samples");
        }
        const Level chosen = level_argument(level);
        const unsigned workers = threads_argument(threads);
        const double *const weighted = weights_ ? weights_->data() : nullptr;
        const auto count = static_cast<std::size_t>(rows_.shape(0));
        const auto features = static_cast<std::size_t>(rows_.shape(1));
        const Span<const T> span = values(rows_);
        const py::gil_scoped_release release;
        const lowtide::DefaultArithmetic exact;
        samples_.emplace(span, count, features, weighted, chosen, workers);
    }

    py::dict assign(const Array<T> &centroids, const std::string &mode, double kappa,
                    double kappa_sums, bool wants_distances, long long threads,
                    const std::vector<FaultArgument> &asked) {
        check_shape(centroids, "centroids");
        const std::size_t features = samples_->view().features;
        if (static_cast<std::size_t>(centroids.shape(1)) != features) {
            throw py::value_error("centroids: got " + std::to_string(centroids.shape(1)) +
                                  " features, allowed is " + std::to_string(features) +
                                  " as the samples have");
        }
        if (!(kappa > 0 && kappa_sums > 0)) {
            throw py::value_error("kappa: got a number that is not positive");
        }
        const auto count = centroids.shape(0);
        std::vector<Fault> faults = faults_argument(asked);
        Request<T> request;
        request.centroids = values(centroids);
        request.count = static_cast<std::size_t>(count);
        request.mode = named(mode, modes, "mode");
        request.kappa = kappa;
        request.kappa_sums = kappa_sums;
        request.threads = threads_argument(threads);
        request.faults = {faults.data(), faults.size()};
        Array<std::int32_t> labels(rows_.shape(0));
        Array<double> distances(wants_distances ? rows_.shape(0) : 0);
        Array<double> sums({count, static_cast<py::ssize_t>(features)});
        Array<double> weights(count);
        Results results;
        results.labels = writable(labels);
        results.distances = writable(distances);
        results.sums = writable(sums);
        results.weights = writable(weights);
        Outcome outcome;
        {
            const py::gil_scoped_release release;
            outcome = lowtide::kmeans::assign(*samples_, request, results);
        }
        py::dict made;
        made["labels"] = labels;
        made["distances"] = wants_distances ? py::object(distances) : py::none();
        made["sums"] = sums;
        made["counts"] = weights;
        made["inertia"] = outcome.inertia;
        made["report"] = report(outcome.counts);
        made["log"] = log(faults);
        return made;
    }

    Array<T> origin() const {
        const std::vector<T> &found = samples_->frame().origin;
        return Array<T>(static_cast<py::ssize_t>(found.size()), found.data());
    }

    double scale() const { return static_cast<double>(samples_->frame().scale); }

  private:
    static py::dict report(const Counts &counts) {
        py::dict made;
        made["checks"] = counts.checks;
        made["detected"] = counts.detected;
        made["corrected"] = counts.corrected;
        made["recomputed"] = counts.recomputed;
        made["uncorrected"] = counts.uncorrected;
        made["max_residual"] = counts.max_residual;
        return made;
    }

    // (happened, before, after) for each fault.
    static py::list log(const std::vector<Fault> &faults) {
        py::list made;
        for (const Fault &fault : faults) {
            made.append(py::make_tuple(fault.happened, fault.before, fault.after));
        }
        return made;
    }

    Array<T> rows_;
    std::optional<Array<double>> weights_;
    std::optional<Samples<T>> samples_;
};

template <typename T> void bind_samples(py::module_ &module, const char *name) {
    using Bound = PreparedSamples<T>;
    py::class_<Bound>(module, name, "Samples made ready for many passes.")
        .def(py::init<Array<T>, std::optional<Array<double>>, const std::string &, long long>(),
             py::arg("samples"), py::arg("weights"), py::arg("level") = "auto",
             py::arg("threads") = 1)
        .def("assign", &Bound::assign, py::arg("centroids"), py::arg("mode") = "off",
             py::arg("kappa") = 1.0, py::arg("kappa_sums") = 1.0, py::arg("distances") = true,
             py::arg("threads") = 1, py::arg("faults") = std::vector<FaultArgument>(),
             "One pass. Returns labels, distances, sums, counts, inertia, report and log.")
        .def_property_readonly("origin", &Bound::origin,
                               "What is taken off the samples before anything is computed.")
        .def_property_readonly("scale", &Bound::scale,
                               "What they are multiplied with then, a power of two.");
}

} // namespace

void bind_kmeans(py::module_ &module) {
    bind_samples<float>(module, "SamplesFloat32");
    bind_samples<double>(module, "SamplesFloat64");
    module.attr("group_centroids") = group_centroids;
    module.attr("feature_block") = feature_block;
    module.def("levels", &levels, "Instruction sets that this processor can run, slowest first.");
}
