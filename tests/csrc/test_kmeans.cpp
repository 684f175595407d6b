// Run under the sanitizers by tests/kmeans/test_sanitizers.py: arrays that end where they end, on
// every instruction set, with and without checks, errors put in, several threads.
#include "kmeans/assign.hpp"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using namespace lowtide::kmeans;
using lowtide::Span;

struct Shape {
    std::size_t count, features, clusters;
};

constexpr Shape shapes[] = {{0, 3, 2},    {1, 1, 1},    {31, 5, 12},  {65, 16, 13},   {130, 17, 11},
                            {97, 3, 140}, {40, 300, 9}, {2100, 2, 7}, {200, 20, 1400}};

double number(std::size_t i) { return static_cast<double>((i * 2654435761u >> 7) % 1000) / 500; }

template <typename T> std::vector<T> numbers(std::size_t count, std::size_t seed) {
    std::vector<T> made(count);
    for (std::size_t i = 0; i < count; ++i) {
        made[i] = static_cast<T>(number(i + seed));
    }
    return made;
}

struct Output {
    std::vector<std::int32_t> labels;
    std::vector<double> distances, sums, weights;

    Output(const Shape &shape, bool wants_distances)
        : labels(shape.count), distances(wants_distances ? shape.count : 0),
          sums(shape.clusters * shape.features), weights(shape.clusters) {}

    Results views() {
        return {{labels.data(), labels.size()},
                {distances.data(), distances.size()},
                {sums.data(), sums.size()},
                {weights.data(), weights.size()}};
    }
};

std::vector<Fault> faults_for(const Shape &shape) {
    std::vector<Fault> faults;
    for (std::size_t row = 0; row < shape.count; row += 3) {
        Fault fault;
        fault.site = static_cast<Site>(row % 9);
        fault.row = row;
        const bool is_feature = fault.site == Site::sum;
        fault.column = row % (is_feature ? shape.features : shape.clusters);
        fault.bit = static_cast<unsigned>(row % 64);
        faults.push_back(fault);
    }
    return faults;
}

template <typename T> bool works(Level level, const Shape &shape) {
    const auto rows = numbers<T>(shape.count * shape.features, 1);
    const auto centroids = numbers<T>(shape.clusters * shape.features, 77);
    const auto weights = numbers<double>(shape.count, 5);
    bool is_right = true;
    for (const double *weighted : {static_cast<const double *>(nullptr), weights.data()}) {
        Samples<T> samples({rows.data(), rows.size()}, shape.count, shape.features, weighted, level,
                           3);
        Request<T> request;
        request.centroids = {centroids.data(), centroids.size()};
        request.count = shape.clusters;
        request.kappa = request.kappa_sums = 8;
        request.threads = 3;
        Output clean(shape, true);
        assign(samples, request, clean.views());
        for (const Mode mode : {Mode::off, Mode::detect, Mode::correct, Mode::recompute}) {
            request.mode = mode;
            request.faults = {};
            Output again(shape, false);
            assign(samples, request, again.views());
            is_right = is_right && again.labels == clean.labels && again.sums == clean.sums;
            std::vector<Fault> faults = faults_for(shape);
            request.faults = {faults.data(), faults.size()};
            assign(samples, request, again.views());
            const bool is_corrected = mode == Mode::correct || mode == Mode::recompute;
            is_right = is_right && (!is_corrected || again.labels == clean.labels);
        }
    }
    return is_right;
}

} // namespace

int main() {
    int failures = 0;
    for (const Level level : {Level::generic, Level::avx2, Level::avx512}) {
        if (kernels_of<float>(level) == nullptr) {
            continue;
        }
        for (const Shape &shape : shapes) {
            const bool is_right = works<float>(level, shape) && works<double>(level, shape);
            if (!is_right) {
                std::fprintf(stderr, "failed: %s, %zu x %zu x %zu\n", name_of(level), shape.count,
                             shape.features, shape.clusters);
                ++failures;
            }
        }
    }
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
