// Event-driven simulation of one optimizer update: which lane works on which piece until when.
//
// The rules are those of plugins/lowtide/offload/reference.py, which takes the same steps
// in the same arithmetic; a test holds both together.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lowtide::offload {

constexpr std::size_t lane_count = 6;
enum Lane : std::size_t { host, downcast, prefetch, upload, device, flush };

// Speeds of the lanes, each alone; 0 for a downcast that is fused and for memory without a limit.
struct LaneRates {
    double host_to_device_bytes_per_s = 0;
    double device_to_host_bytes_per_s = 0;
    bool is_duplex = true;
    double host_params_per_s = 0;
    double downcast_params_per_s = 0;
    double device_params_per_s = 0;
    double launch_s = 0;
    double host_memory_bytes_per_s = 0;
    double host_update_bytes = 0;
};

// Sizes of the pieces, one entry each; exact integers below 2^53.
struct PieceSizes {
    std::vector<double> numel;
    std::vector<double> upload_bytes;
    std::vector<double> gradient_bytes;
};

constexpr std::uint32_t downcast_in_background = 1;
constexpr std::uint32_t upload_blocks_host = 2;

// One plan. Empty release times, host gates or device gates stand for none.
struct Job {
    std::vector<std::int32_t> device_order;
    std::vector<std::int32_t> host_order;
    std::vector<std::int32_t> residents;
    std::int32_t slots = 0;
    std::vector<double> release_s;          // per piece
    std::vector<std::int32_t> host_gates;   // device updates that come before this host piece
    std::vector<std::int32_t> device_gates; // host pieces that come before this device piece
    std::uint32_t flags = 0;
};

struct LaneSpan {
    std::int32_t piece;
    std::int32_t lane;
    double begin_s;
    double end_s;
};

struct Outcome {
    double makespan_s = 0;
    double host_end_s = 0;
    double device_end_s = 0;
    std::array<double, lane_count> busy_s{};
    std::vector<LaneSpan> spans;
};

// How fast each lane goes while exactly the lanes of `mask` (bit i: lane i) are at work.
std::array<double, lane_count> lane_speeds(const LaneRates &rates, unsigned mask);

// Simulates many plans of the same pieces at the same rates. Not for two threads at once.
class Simulator {
  public:
    // Throws std::invalid_argument where sizes or rates are out of range.
    Simulator(PieceSizes sizes, const LaneRates &rates);

    // Throws std::invalid_argument for a plan that names unknown pieces, has lists of a wrong
    // length or release times that are not finite and >= 0, or can never end.
    Outcome run(const Job &job, bool is_traced);

  private:
    const std::array<double, lane_count> &speeds(unsigned mask);

    PieceSizes sizes_;
    LaneRates rates_;
    std::array<std::array<double, lane_count>, 1u << lane_count> speeds_{};
    std::array<bool, 1u << lane_count> is_known_{};
};

} // namespace lowtide::offload
