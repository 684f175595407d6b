// Event-driven simulation of one optimizer update: which lane works on which piece until when.
//
// The rules are those of plugins/lowtide/offload/reference.py, which takes the same steps
// in the same arithmetic; a test holds both together.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace lowtide::offload {

// Behind the lanes with names, each storage path has one that reads and one that writes.
constexpr std::size_t named_lanes = 6;
constexpr std::size_t most_paths = 8;
constexpr std::size_t most_lanes = named_lanes + 2 * most_paths;
enum Lane : std::size_t { host, downcast, prefetch, upload, device, flush };

using LaneSpeeds = std::array<double, most_lanes>;

struct PathRates {
    double read_bytes_per_s = 0;
    double write_bytes_per_s = 0;
};

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
    std::vector<PathRates> paths;

    std::size_t lane_count() const { return named_lanes + 2 * paths.size(); }
};

// Sizes of the pieces, one entry each; exact integers below 2^53.
struct PieceSizes {
    std::vector<double> numel;
    std::vector<double> upload_bytes;
    std::vector<double> gradient_bytes;      // loaded when the piece is staged, with its state
    std::vector<double> resident_load_bytes; // loaded when it is resident
    std::vector<std::int32_t> path;          // -1: in memory; empty: all of them
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
    std::vector<std::int32_t> stored_order;
    std::int32_t buffers = 0;
    std::int32_t carried = 0;
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
    std::vector<double> busy_s;
    std::vector<LaneSpan> spans;
};

// How fast each lane goes while exactly the lanes of `mask` (bit i: lane i) are at work.
LaneSpeeds lane_speeds(const LaneRates &rates, unsigned mask);

// Throws std::invalid_argument for a job that names unknown pieces, has lists of a wrong length or
// release times that are not finite and >= 0.
void check_job(const PieceSizes &sizes, const Job &job);

// Simulates many plans of the same pieces at the same rates. Not for two threads at once.
class Simulator {
  public:
    // Throws std::invalid_argument where sizes or rates are out of range.
    Simulator(PieceSizes sizes, const LaneRates &rates);

    // Throws std::invalid_argument for a plan that names unknown pieces, has lists of a wrong
    // length or release times that are not finite and >= 0, or can never end.
    Outcome run(const Job &job, bool is_traced);

  private:
    const LaneSpeeds &speeds(unsigned mask);

    PieceSizes sizes_;
    LaneRates rates_;
    std::array<LaneSpeeds, 1u << named_lanes> speeds_{};
    std::array<bool, 1u << named_lanes> is_known_{};
    std::unordered_map<unsigned, LaneSpeeds> with_storage_;
};

} // namespace lowtide::offload
