#include "network.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <stdexcept>

#include "common/cpu_features.hpp"
#include "common/default_arithmetic.hpp"
#include "common/thread_pool.hpp"

namespace lowtide::compression {
namespace {

// So many samples are computed at a time, one in each lane: what one lane does, all do, and so the
// width of the processor's registers changes nothing. Numbers lie in groups of this many.
constexpr std::size_t lanes = 16;
constexpr std::size_t alignment = lanes * sizeof(float);

// `width` lanes are in a register, and sums for `channels` channels are under way at a time: as
// many as the processor has registers for.
template <std::size_t width_, std::size_t channels_> struct Registers {
    static constexpr std::size_t width = width_;
    static constexpr std::size_t channels = channels_;
    static constexpr std::size_t parts = lanes / width;
    typedef float Vector __attribute__((vector_size(width_ * sizeof(float)), may_alias));
};

// What layers of one network may take: enough for every use, and safe to multiply.
constexpr std::size_t most_numbers = std::size_t{1} << 24;

void refuse(std::size_t number, const std::string &what) {
    throw std::invalid_argument("layers: number " + std::to_string(number) + ": " + what);
}

std::size_t positions_out(const Layer &layer, std::size_t positions_in) {
    return layer.kind == LayerKind::affine ? layer.offsets.size() - 1 : positions_in;
}

void check_sources(const Layer &layer, std::size_t number, std::size_t positions_in) {
    const std::size_t matrix = layer.channels_in * layer.bias.size();
    const std::size_t taps = layer.weights.size() / matrix;
    if (layer.offsets.empty() || layer.sources.size() != layer.taps.size() ||
        layer.offsets[0] != 0 ||
        static_cast<std::size_t>(layer.offsets[layer.offsets.size() - 1]) != layer.sources.size()) {
        refuse(number, "offsets do not fit the sources");
    }
    for (std::size_t i = 1; i < layer.offsets.size(); ++i) {
        if (layer.offsets[i] < layer.offsets[i - 1]) {
            refuse(number, "offsets fall");
        }
    }
    for (std::size_t i = 0; i < layer.sources.size(); ++i) {
        if (layer.sources[i] < 0 || static_cast<std::size_t>(layer.sources[i]) >= positions_in ||
            layer.taps[i] < 0 || static_cast<std::size_t>(layer.taps[i]) >= taps) {
            refuse(number, "a source or a tap is not there");
        }
    }
}

// Returns the most numbers that a sample has between two layers.
std::size_t check(const std::vector<Layer> &layers, std::size_t size_in, std::size_t size_out) {
    std::size_t size = size_in, largest = size_in;
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const Layer &layer = layers[i];
        const std::size_t channels = layer.bias.size();
        if (layer.channels_in == 0 || channels == 0 || size % layer.channels_in != 0) {
            refuse(i, "channels do not fit the layer before");
        }
        const std::size_t matrix = layer.channels_in * channels;
        if (layer.channels_in > most_numbers || channels > most_numbers || matrix > most_numbers ||
            layer.weights.empty() || layer.weights.size() % matrix != 0) {
            refuse(i, "weights do not fit the channels");
        }
        const std::size_t positions_in = size / layer.channels_in;
        if (layer.kind == LayerKind::affine) {
            check_sources(layer, i, positions_in);
        } else if (layer.weights.size() != matrix || channels != layer.channels_in) {
            refuse(i, "weights are not one square matrix");
        }
        const std::size_t positions = positions_out(layer, positions_in);
        if (positions > most_numbers / channels) {
            refuse(i, "gives too many numbers");
        }
        size = positions * channels;
        largest = std::max(largest, size);
    }
    if (size != size_out || layers.empty()) {
        throw std::invalid_argument("layers: give " + std::to_string(size) + " numbers, to has " +
                                    std::to_string(size_out));
    }
    return largest;
}

#define LOWTIDE_INLINE inline __attribute__((always_inline))

// Channels `channel` to `channel` + tile - 1 of one position.
template <typename R, std::size_t tile>
LOWTIDE_INLINE void weighted_sums(const Layer &layer, std::size_t begin, std::size_t end,
                                  std::size_t channel, const float *from, float *to) {
    using Vector = typename R::Vector;
    const std::size_t channels = layer.bias.size();
    Vector sum[tile][R::parts];
    for (std::size_t i = 0; i < tile; ++i) {
        for (std::size_t part = 0; part < R::parts; ++part) {
            sum[i][part] = Vector{} + layer.bias[channel + i];
        }
    }
    const bool is_affine = layer.kind == LayerKind::affine;
    for (std::size_t at = begin; at < end; ++at) {
        const std::size_t source = is_affine ? static_cast<std::size_t>(layer.sources[at]) : 0;
        const std::size_t tap = is_affine ? static_cast<std::size_t>(layer.taps[at]) : 0;
        const float *x = from + source * layer.channels_in * lanes;
        const float *w = layer.weights.data() + tap * layer.channels_in * channels + channel;
        for (std::size_t j = 0; j < layer.channels_in; ++j) {
            Vector in[R::parts];
            for (std::size_t part = 0; part < R::parts; ++part) {
                in[part] = reinterpret_cast<const Vector *>(x)[part];
            }
            for (std::size_t i = 0; i < tile; ++i) {
                for (std::size_t part = 0; part < R::parts; ++part) {
                    sum[i][part] += w[i] * in[part];
                }
            }
            x += lanes;
            w += channels;
        }
    }
    for (std::size_t i = 0; i < tile; ++i) {
        for (std::size_t part = 0; part < R::parts; ++part) {
            reinterpret_cast<Vector *>(to + (channel + i) * lanes)[part] = sum[i][part];
        }
    }
}

template <typename R>
LOWTIDE_INLINE void all_channels(const Layer &layer, std::size_t begin, std::size_t end,
                                 const float *from, float *to) {
    std::size_t channel = 0;
    for (; channel + R::channels <= layer.bias.size(); channel += R::channels) {
        weighted_sums<R, R::channels>(layer, begin, end, channel, from, to);
    }
    for (; channel < layer.bias.size(); ++channel) {
        weighted_sums<R, 1>(layer, begin, end, channel, from, to);
    }
}

template <typename R>
LOWTIDE_INLINE void run_layer(const Layer &layer, std::size_t positions_in, const float *from,
                              float *to, float *squares) {
    const std::size_t channels = layer.bias.size();
    const std::size_t numbers = channels * lanes; // of a position
    for (std::size_t position = 0; position < positions_out(layer, positions_in); ++position) {
        float *out = to + position * numbers;
        if (layer.kind == LayerKind::affine) {
            all_channels<R>(layer, static_cast<std::size_t>(layer.offsets[position]),
                            static_cast<std::size_t>(layer.offsets[position + 1]), from, out);
            continue;
        }
        const float *in = from + position * numbers;
        for (std::size_t i = 0; i < numbers; ++i) {
            squares[i] = in[i] * in[i];
        }
        all_channels<R>(layer, 0, 1, squares, out);
        for (std::size_t i = 0; i < numbers; ++i) {
            const float root = std::sqrt(out[i]);
            out[i] = layer.kind == LayerKind::multiply ? in[i] * root : in[i] / root;
        }
    }
}

struct Job {
    const std::vector<Layer> &layers;
    std::size_t size_in; // numbers of a sample
    std::size_t largest; // the most that it has between two layers
    const float *from;
    float *to;
};

// Samples `begin` to `end` - 1; `memory` holds 3 * largest * lanes numbers.
template <typename R>
LOWTIDE_INLINE void run_range(const Job &job, std::size_t begin, std::size_t end, float *memory) {
    for (std::size_t first = begin; first < end; first += lanes) {
        const std::size_t used = std::min(lanes, end - first);
        float *from = memory, *to = from + job.largest * lanes, *squares = to + job.largest * lanes;
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            // Lanes without a sample repeat the first one.
            const float *sample = job.from + (first + (lane < used ? lane : 0)) * job.size_in;
            for (std::size_t i = 0; i < job.size_in; ++i) {
                from[i * lanes + lane] = sample[i];
            }
        }
        std::size_t size = job.size_in;
        for (const Layer &layer : job.layers) {
            const std::size_t positions = size / layer.channels_in;
            run_layer<R>(layer, positions, from, to, squares);
            size = positions_out(layer, positions) * layer.bias.size();
            std::swap(from, to);
        }
        for (std::size_t lane = 0; lane < used; ++lane) {
            float *result = job.to + (first + lane) * size;
            for (std::size_t i = 0; i < size; ++i) {
                result[i] = from[i * lanes + lane];
            }
        }
    }
}

using RangeKernel = void (*)(const Job &, std::size_t, std::size_t, float *);

void run_scalar(const Job &job, std::size_t begin, std::size_t end, float *memory) {
    run_range<Registers<4, 2>>(job, begin, end, memory);
}

LOWTIDE_TARGET("avx2")
void run_avx2(const Job &job, std::size_t begin, std::size_t end, float *memory) {
    run_range<Registers<8, 4>>(job, begin, end, memory);
}

LOWTIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
void run_avx512(const Job &job, std::size_t begin, std::size_t end, float *memory) {
    run_range<Registers<16, 8>>(job, begin, end, memory);
}

struct Level {
    const char *name;
    RangeKernel kernel;
};

std::vector<Level> levels_here() {
    std::vector<Level> levels{{"scalar", run_scalar}};
#if LOWTIDE_X86
    if (cpu_features().avx2) {
        levels.push_back({"avx2", run_avx2});
    }
    if (cpu_features().avx512) {
        levels.push_back({"avx512", run_avx512});
    }
#endif
    return levels;
}

RangeKernel kernel_of(const std::string &level) {
    const std::vector<Level> levels = levels_here();
    if (level == "auto") {
        return levels.back().kernel;
    }
    for (const Level &each : levels) {
        if (level == each.name) {
            return each.kernel;
        }
    }
    throw std::invalid_argument("level: got '" + level +
                                "', which cannot run here; use one of network_levels()");
}

} // namespace

std::vector<std::string> network_levels() {
    std::vector<std::string> names;
    for (const Level &level : levels_here()) {
        names.emplace_back(level.name);
    }
    return names;
}

void network_run(const std::vector<Layer> &layers, std::size_t count, Span<const float> from,
                 Span<float> to, unsigned threads, const std::string &level) {
    const RangeKernel kernel = kernel_of(level);
    if (count == 0 || from.size() % count != 0 || to.size() % count != 0) {
        throw std::invalid_argument("samples: " + std::to_string(from.size()) +
                                    " numbers are not " + std::to_string(count) + " samples");
    }
    const std::size_t size_in = from.size() / count, size_out = to.size() / count;
    if (size_in == 0 || size_in > most_numbers) {
        throw std::invalid_argument("samples: of " + std::to_string(size_in) + " numbers");
    }
    const std::size_t largest = check(layers, size_in, size_out);
    const Job job{layers, size_in, largest, from.data(), to.data()};
    std::atomic<bool> has_failed{false};
    // The pool shares out by numbers, not by samples, of which few are much work.
    run_in_ranges(count * largest, lanes * largest, threads,
                  [&](std::size_t begin, std::size_t end) {
                      const DefaultArithmetic here;
                      try {
                          const std::size_t bytes = 3 * largest * lanes * sizeof(float);
                          const auto align = std::align_val_t{alignment};
                          auto *memory = static_cast<float *>(::operator new(bytes, align));
                          kernel(job, begin / largest, end / largest, memory);
                          ::operator delete(memory, align);
                      } catch (const std::bad_alloc &) {
                          has_failed = true;
                      }
                  });
    if (has_failed) {
        throw std::bad_alloc();
    }
}

} // namespace lowtide::compression
