// The networks and the decoder of learned blocks under the sanitizers: on every instruction set,
// with few and many samples, and with layers that do not fit, which must be refused.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "compression/network.hpp"
#include "compression/predict.hpp"

using namespace lowtide::compression;
using lowtide::Span;

namespace {

std::mt19937 chance(3);

void require(bool holds, const std::string &what) {
    if (!holds) {
        std::fprintf(stderr, "failed: %s\n", what.c_str());
        std::exit(1);
    }
}

std::vector<float> numbers(std::size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> found(count);
    for (float &number : found) {
        number = normal(chance);
    }
    return found;
}

template <typename T> Span<const T> view(const std::vector<T> &values) {
    return {values.data(), values.size()};
}

// Two positions of `in` channels, each summed over both through its own tap; then a norm.
struct Network {
    Network(std::size_t in, std::size_t out)
        : in_(in), weights(numbers(2 * in * out)), bias(numbers(out)), matrix(out * out, 0.5f),
          ones(out, 1.0f) {}

    std::vector<Layer> layers() const {
        return {{LayerKind::affine, view(weights), view(bias), in_, view(offsets), view(sources),
                 view(taps)},
                {LayerKind::divide, view(matrix), view(ones), bias.size(), {}, {}, {}},
                {LayerKind::multiply, view(matrix), view(ones), bias.size(), {}, {}, {}}};
    }

    std::size_t in_;
    std::vector<float> weights, bias, matrix, ones;
    std::vector<std::int32_t> offsets{0, 2, 4}, sources{0, 1, 1, 0}, taps{0, 1, 0, 1};
};

void levels_agree(std::size_t in, std::size_t out, std::size_t count) {
    const Network network(in, out);
    const std::vector<float> samples = numbers(count * 2 * in);
    std::vector<std::vector<float>> found;
    for (const std::string &level : network_levels()) {
        for (const unsigned threads : {1u, 3u}) {
            std::vector<float> result(count * 2 * out);
            network_run(network.layers(), count, view(samples),
                        Span<float>(result.data(), result.size()), threads, level);
            found.push_back(result);
        }
    }
    for (const auto &each : found) {
        require(each == found[0], "all levels give the same bits");
    }
}

void refuses(const Network &network, std::size_t numbers_in, std::size_t numbers_out) {
    const std::vector<float> samples(3 * numbers_in);
    std::vector<float> result(3 * numbers_out);
    try {
        network_run(network.layers(), 3, view(samples), Span<float>(result.data(), result.size()),
                    1, "auto");
    } catch (const std::invalid_argument &) {
        return;
    }
    require(false, "a network that does not fit is refused");
}

void refuse_what_does_not_fit() {
    refuses(Network(2, 3), 5, 6);
    refuses(Network(2, 3), 4, 5);
    refuses(Network(2, 3), 2, 6); // one position, and sources see two
    for (int turn = 0; turn < 6; ++turn) {
        Network network(2, 3);
        std::vector<std::int32_t> *changed[] = {&network.offsets, &network.sources, &network.taps};
        (*changed[turn / 2])[1] = turn % 2 == 0 ? -1 : 1000;
        refuses(network, 4, 6);
    }
    Network network(2, 3);
    network.weights.pop_back();
    refuses(network, 4, 6);
    network = Network(2, 3);
    network.offsets.clear();
    refuses(network, 4, 6);
    network = Network(2, 3);
    network.matrix.resize(6);
    refuses(network, 4, 6);
}

template <typename T> void mixed(const std::vector<std::size_t> &lengths) {
    const Shape shape(lengths);
    std::vector<std::int32_t> codes(shape.count), predicted(shape.count);
    std::vector<unsigned char> mask(shape.count);
    for (std::size_t i = 0; i < shape.count; ++i) {
        codes[i] = static_cast<std::int32_t>(chance());
        predicted[i] = static_cast<std::int32_t>(chance());
        mask[i] = static_cast<unsigned char>(chance() % 2);
    }
    std::vector<int> orders(lengths.size());
    for (int &order : orders) {
        order = static_cast<int>(chance() % 3);
    }
    std::vector<T> restored(shape.count);
    mixed_decode<T>(Span<std::int32_t>(codes.data(), codes.size()), view(predicted), view(mask),
                    shape, orders, 0.5, Span<T>(restored.data(), restored.size()));
}

} // namespace

int main() {
    for (const std::size_t in : {1u, 5u}) {
        for (const std::size_t out : {1u, 3u, 8u, 17u}) {
            for (const std::size_t count : {1u, 15u, 16u, 17u, 300u}) {
                levels_agree(in, out, count);
            }
        }
    }
    refuse_what_does_not_fit();
    for (int turn = 0; turn < 20; ++turn) {
        for (const auto &lengths : std::vector<std::vector<std::size_t>>{
                 {1}, {9}, {3, 4}, {1, 1, 7}, {2, 3, 4, 5}, {5, 1, 2, 1}}) {
            mixed<float>(lengths);
            mixed<double>(lengths);
        }
    }
    std::puts("ok");
}
