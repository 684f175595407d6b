// What a simulator takes and refuses, and how fast its lanes go.
#include "schedule.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace lowtide::offload {
namespace {

constexpr double downcast_bytes = 6; // host memory traffic: read 4, write 2
constexpr double never = std::numeric_limits<double>::infinity();

bool is_positive(double value) { return value > 0 && value < never; }
bool is_at_least_zero(double value) { return value >= 0 && value < never; }

void check_indices(const std::vector<std::int32_t> &list, std::size_t count, const char *name) {
    for (const std::int32_t value : list) {
        if (value < 0 || static_cast<std::size_t>(value) >= count) {
            throw std::invalid_argument(std::string(name) + ": got piece " + std::to_string(value) +
                                        ", allowed is 0 to " + std::to_string(count) + " - 1");
        }
    }
}

void check_length(std::size_t found, std::size_t wanted, const char *name) {
    if (found != 0 && found != wanted) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(found) +
                                    " entries, allowed is 0 or " + std::to_string(wanted));
    }
}

} // namespace

void check_job(const PieceSizes &sizes, const Job &job) {
    const std::size_t count = sizes.numel.size();
    check_indices(job.device_order, count, "device_order");
    check_indices(job.host_order, count, "host_order");
    check_indices(job.residents, count, "residents");
    check_indices(job.stored_order, count, "stored_order");
    if (job.buffers < 0 || job.carried < 0) {
        throw std::invalid_argument("buffers and carried: allowed are numbers from 0");
    }
    for (const std::int32_t i : job.stored_order) {
        if (sizes.path.empty() || sizes.path[static_cast<std::size_t>(i)] < 0) {
            throw std::invalid_argument("stored_order: piece " + std::to_string(i) +
                                        " has no path");
        }
    }
    check_length(job.release_s.size(), count, "release_s");
    check_length(job.host_gates.size(), job.host_order.size(), "host_gates");
    check_length(job.device_gates.size(), job.device_order.size(), "device_gates");
    if (!std::all_of(job.release_s.begin(), job.release_s.end(), is_at_least_zero)) {
        throw std::invalid_argument("release_s: allowed are finite numbers from 0");
    }
}

LaneSpeeds lane_speeds(const LaneRates &rates, unsigned mask) {
    const auto is_busy = [mask](std::size_t lane) { return (mask >> lane & 1u) != 0; };
    const int to_device = is_busy(prefetch) + is_busy(upload);
    const int from_device = is_busy(flush);
    const int sharing_in = rates.is_duplex ? to_device : to_device + from_device;
    const int sharing_out = rates.is_duplex ? from_device : to_device + from_device;
    const double inward = rates.host_to_device_bytes_per_s / std::max(sharing_in, 1);
    const double outward = rates.device_to_host_bytes_per_s / std::max(sharing_out, 1);
    LaneSpeeds alone{
        rates.host_params_per_s, rates.downcast_params_per_s, inward, inward, 1.0, outward};
    LaneSpeeds traffic{rates.host_params_per_s * rates.host_update_bytes,
                       rates.downcast_params_per_s * downcast_bytes,
                       inward,
                       inward,
                       0.0,
                       outward};
    const std::size_t lanes = rates.lane_count();
    for (std::size_t lane = named_lanes; lane < lanes; ++lane) {
        const PathRates &path = rates.paths[(lane - named_lanes) / 2];
        alone[lane] = lane % 2 == 0 ? path.read_bytes_per_s : path.write_bytes_per_s;
        traffic[lane] = alone[lane];
    }
    LaneSpeeds found{};
    std::vector<std::pair<double, std::size_t>> waiting;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
        found[lane] = is_busy(lane) ? alone[lane] : 0.0;
        if (found[lane] != 0 && traffic[lane] != 0) {
            waiting.emplace_back(traffic[lane], lane);
        }
    }
    if (rates.host_memory_bytes_per_s == 0) {
        return found;
    }
    // Max-min fairness: the modest get what they want, the others equal shares of what is left.
    std::sort(waiting.begin(), waiting.end());
    double left = rates.host_memory_bytes_per_s;
    for (std::size_t place = 0; place < waiting.size(); ++place) {
        auto [wanted, lane] = waiting[place];
        const double fair = left / static_cast<double>(waiting.size() - place);
        if (wanted > fair) {
            found[lane] = alone[lane] * (fair / wanted);
            wanted = fair;
        }
        left -= wanted;
    }
    return found;
}

Simulator::Simulator(PieceSizes sizes, const LaneRates &rates)
    : sizes_(std::move(sizes)), rates_(rates) {
    const std::size_t count = sizes_.numel.size();
    if (sizes_.upload_bytes.size() != count || sizes_.gradient_bytes.size() != count ||
        sizes_.resident_load_bytes.size() != count ||
        (!sizes_.path.empty() && sizes_.path.size() != count)) {
        throw std::invalid_argument("sizes: numel, upload_bytes, gradient_bytes, "
                                    "resident_load_bytes and path must have the same length");
    }
    if (rates.paths.size() > most_paths) {
        throw std::invalid_argument("rates: allowed are at most 8 paths");
    }
    for (const std::int32_t path : sizes_.path) {
        if (path >= 0 && static_cast<std::size_t>(path) >= rates.paths.size()) {
            throw std::invalid_argument("path: got " + std::to_string(path) +
                                        ", and there are no rates for it");
        }
    }
    for (const PathRates &path : rates.paths) {
        if (!is_positive(path.read_bytes_per_s) || !is_positive(path.write_bytes_per_s)) {
            throw std::invalid_argument("paths: allowed are finite numbers above 0");
        }
    }
    // A NaN among them would make a lane that never ends.
    if (!std::all_of(sizes_.numel.begin(), sizes_.numel.end(), is_positive)) {
        throw std::invalid_argument("numel: allowed are finite numbers above 0");
    }
    for (const auto *list :
         {&sizes_.upload_bytes, &sizes_.gradient_bytes, &sizes_.resident_load_bytes}) {
        if (!std::all_of(list->begin(), list->end(), is_at_least_zero)) {
            throw std::invalid_argument("sizes: allowed are finite numbers from 0");
        }
    }
    for (const double rate : {rates.host_to_device_bytes_per_s, rates.device_to_host_bytes_per_s,
                              rates.host_params_per_s, rates.device_params_per_s}) {
        if (!is_positive(rate)) {
            throw std::invalid_argument("rates: allowed are finite numbers above 0");
        }
    }
    for (const double value : {rates.downcast_params_per_s, rates.launch_s,
                               rates.host_memory_bytes_per_s, rates.host_update_bytes}) {
        if (!is_at_least_zero(value)) {
            throw std::invalid_argument("rates: allowed are finite numbers from 0");
        }
    }
}

const LaneSpeeds &Simulator::speeds(unsigned mask) {
    if (mask >> named_lanes != 0) {
        const auto [found, is_new] = with_storage_.try_emplace(mask);
        if (is_new) {
            found->second = lane_speeds(rates_, mask);
        }
        return found->second;
    }
    if (!is_known_[mask]) {
        speeds_[mask] = lane_speeds(rates_, mask);
        is_known_[mask] = true;
    }
    return speeds_[mask];
}

} // namespace lowtide::offload
