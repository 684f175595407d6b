#include "schedule.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace lowtide::offload {
namespace {

constexpr double state_bytes = 12; // fp32 master weight and two fp32 moments
constexpr double never = std::numeric_limits<double>::infinity();

class Queue {
  public:
    explicit Queue(std::size_t capacity) { items_.reserve(capacity); }
    bool empty() const { return head_ == items_.size(); }
    void push(std::int32_t item) { items_.push_back(item); }
    std::int32_t pop() { return items_[head_++]; }

  private:
    std::vector<std::int32_t> items_;
    std::size_t head_ = 0;
};

// One simulation while it goes on; the Python reference has the same members.
class Run {
  public:
    Run(const PieceSizes &sizes, const LaneRates &rates, const Job &job, bool is_traced)
        : sizes_(sizes), rates_(rates), job_(job), is_traced_(is_traced),
          is_held_(sizes.numel.size(), 0), is_loaded_(sizes.numel.size(), 0),
          downcasts_(job.host_order.size()), uploads_(job.host_order.size()),
          flushes_(job.device_order.size()), releases_(job.release_s), lanes_(rates.lane_count()),
          is_arrived_(sizes.numel.size(), 0), is_staying_(sizes.numel.size(), 0),
          transfers_(2 * rates.paths.size(), Queue(job.stored_order.size())) {
        piece_.fill(-1);
        result_.busy_s.resize(lanes_);
        const std::size_t stored = job.stored_order.size();
        const std::size_t carried = std::min({index(job.carried), index(job.buffers), stored});
        read_next_ = carried;
        buffers_free_ = index(job.buffers) - carried;
        for (std::size_t turn = 0; turn < carried; ++turn) {
            is_arrived_[index(job.stored_order[turn])] = 1;
            is_staying_[index(job.stored_order[stored - 1 - turn])] = 1;
        }
        for (const std::int32_t i : job.residents) {
            is_held_[index(i)] = 1;
        }
        std::sort(releases_.begin(), releases_.end());
        if (is_traced) {
            result_.spans.reserve(3 * sizes.numel.size());
        }
    }

    void start() {
        start_host();
        start_queued(downcast, downcasts_);
        start_queued(upload, uploads_);
        start_queued(flush, flushes_);
        start_device(); // before the prefetch: it may need no load at all
        start_prefetch();
        start_storage();
    }

    unsigned mask() const {
        unsigned bits = 0;
        for (std::size_t lane = 0; lane < lanes_; ++lane) {
            bits |= static_cast<unsigned>(piece_[lane] >= 0) << lane;
        }
        return bits;
    }

    // When the next gradient becomes ready.
    double next_release_s() {
        while (released_ < releases_.size() && releases_[released_] <= now_s_) {
            ++released_;
        }
        return released_ < releases_.size() ? releases_[released_] : never;
    }

    void sleep_until(double time_s) { now_s_ = time_s; }

    // Goes on to the next end of a span, or to the next release if that comes first.
    void advance(const LaneSpeeds &speed, double wake_s) {
        LaneSpeeds need; // of the lanes that there are
        double step_s = never;
        for (std::size_t lane = 0; lane < lanes_; ++lane) {
            need[lane] = piece_[lane] >= 0 ? work_[lane] / speed[lane] : never;
            step_s = std::min(step_s, need[lane]);
        }
        if (wake_s - now_s_ < step_s) {
            step_s = wake_s - now_s_;
            now_s_ = wake_s;
        } else {
            now_s_ += step_s;
        }
        unsigned ended = 0;
        for (std::size_t lane = 0; lane < lanes_; ++lane) {
            if (piece_[lane] < 0) {
                continue;
            }
            if (need[lane] <= step_s) {
                ended |= 1u << lane;
            } else {
                work_[lane] -= speed[lane] * step_s;
            }
        }
        for (std::size_t lane = 0; lane < lanes_; ++lane) {
            if ((ended >> lane & 1u) != 0) {
                end(lane);
            }
        }
    }

    Outcome finish() {
        if (host_done_ < job_.host_order.size() || device_done_ < job_.device_order.size() ||
            stored_done_ < job_.stored_order.size()) {
            throw std::invalid_argument("plan: it can never end: pieces wait for each other");
        }
        result_.makespan_s = now_s_;
        return std::move(result_);
    }

  private:
    static std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

    double load_bytes(std::int32_t i) const {
        return is_held_[index(i)]
                   ? sizes_.resident_load_bytes[index(i)]
                   : state_bytes * sizes_.numel[index(i)] + sizes_.gradient_bytes[index(i)];
    }

    bool is_released(std::int32_t i) const {
        return job_.release_s.empty() || job_.release_s[index(i)] <= now_s_;
    }

    static bool is_open(const std::vector<std::int32_t> &gates, std::size_t place,
                        std::size_t done) {
        return gates.empty() || gates[place] <= static_cast<std::int64_t>(done);
    }

    void begin(std::size_t lane, std::int32_t i, double work) {
        piece_[lane] = i;
        work_[lane] = work;
        begin_s_[lane] = now_s_;
    }

    void start_host() {
        if (piece_[host] >= 0 || is_host_held_) {
            return;
        }
        if (stored_next_ < job_.stored_order.size()) {
            const std::int32_t i = job_.stored_order[stored_next_];
            if (is_arrived_[index(i)] && is_released(i)) {
                begin(host, i, sizes_.numel[index(i)]);
                ++stored_next_;
                return;
            }
        }
        if (host_next_ >= job_.host_order.size()) {
            return;
        }
        const std::int32_t i = job_.host_order[host_next_];
        if (is_open(job_.host_gates, host_next_, device_done_) && is_released(i)) {
            begin(host, i, sizes_.numel[index(i)]);
            ++host_next_;
        }
    }

    void start_queued(Lane lane, Queue &queue) {
        if (piece_[lane] >= 0 || queue.empty()) {
            return;
        }
        const std::int32_t i = queue.pop();
        const double numel = sizes_.numel[index(i)];
        begin(lane, i,
              lane == upload     ? sizes_.upload_bytes[index(i)]
              : lane == downcast ? numel
                                 : state_bytes * numel);
    }

    std::size_t path(std::int32_t i) const { return index(sizes_.path[index(i)]); }

    void start_storage() {
        const auto &order = job_.stored_order;
        while (read_next_ < order.size() && buffers_free_ > 0) {
            const std::int32_t i = order[read_next_];
            transfers_[2 * path(i)].push(i);
            --buffers_free_;
            ++read_next_;
        }
        for (std::size_t lane = named_lanes; lane < lanes_; ++lane) {
            Queue &queue = transfers_[lane - named_lanes];
            if (piece_[lane] < 0 && !queue.empty()) {
                const std::int32_t i = queue.pop();
                begin(lane, i, state_bytes * sizes_.numel[index(i)]);
            }
        }
    }

    void start_prefetch() {
        const auto &order = job_.device_order;
        while (load_next_ < order.size() && load_bytes(order[load_next_]) == 0) {
            ++load_next_;
        }
        if (piece_[prefetch] >= 0 || load_next_ >= order.size()) {
            return;
        }
        const std::int32_t i = order[load_next_];
        if (slots_used_ < job_.slots && is_released(i)) {
            begin(prefetch, i, load_bytes(i));
            ++slots_used_;
            ++load_next_;
        }
    }

    void start_device() {
        if (piece_[device] >= 0 || device_next_ >= job_.device_order.size()) {
            return;
        }
        const std::int32_t i = job_.device_order[device_next_];
        const bool is_ready = is_loaded_[index(i)] || (load_bytes(i) == 0 && is_released(i));
        if (is_ready && is_open(job_.device_gates, device_next_, host_done_)) {
            begin(device, i, sizes_.numel[index(i)] / rates_.device_params_per_s + rates_.launch_s);
            ++device_next_;
        }
    }

    void end(std::size_t lane) {
        const std::int32_t i = std::exchange(piece_[lane], -1);
        result_.busy_s[lane] += now_s_ - begin_s_[lane];
        if (is_traced_) {
            result_.spans.push_back({i, static_cast<std::int32_t>(lane), begin_s_[lane], now_s_});
        }
        switch (lane) {
        case host:
            if (is_arrived_[index(i)]) {
                ++stored_done_;
                if (!is_staying_[index(i)]) {
                    transfers_[2 * path(i) + 1].push(i);
                }
            } else {
                ++host_done_;
            }
            if (rates_.downcast_params_per_s == 0) {
                updated(i);
            } else {
                downcasts_.push(i);
                is_host_held_ = (job_.flags & downcast_in_background) == 0;
            }
            break;
        case downcast:
            is_host_held_ = is_host_held_ && (job_.flags & downcast_in_background) != 0;
            updated(i);
            break;
        case upload:
            is_host_held_ = is_host_held_ && (job_.flags & upload_blocks_host) == 0;
            result_.host_end_s = now_s_;
            break;
        case prefetch:
            is_loaded_[index(i)] = 1;
            break;
        case device:
            ++device_done_;
            result_.device_end_s = now_s_;
            if (!is_held_[index(i)]) {
                flushes_.push(i);
            } else if (load_bytes(i) > 0) {
                --slots_used_;
            }
            break;
        case flush:
            --slots_used_;
            result_.device_end_s = now_s_;
            break;
        default:
            if ((lane - named_lanes) % 2 == 0) {
                is_arrived_[index(i)] = 1;
            } else {
                ++buffers_free_;
            }
        }
    }

    // Goes on behind host update and downcast.
    void updated(std::int32_t i) {
        result_.host_end_s = now_s_;
        if (sizes_.upload_bytes[index(i)] > 0) {
            uploads_.push(i);
            is_host_held_ = is_host_held_ || (job_.flags & upload_blocks_host) != 0;
        }
    }

    const PieceSizes &sizes_;
    const LaneRates &rates_;
    const Job &job_;
    bool is_traced_;
    double now_s_ = 0;
    std::size_t host_next_ = 0; // places in the orders: next to start ...
    std::size_t load_next_ = 0;
    std::size_t device_next_ = 0;
    std::size_t host_done_ = 0; // ... and how many are over
    std::size_t device_done_ = 0;
    bool is_host_held_ = false; // by its own downcast or upload
    std::int32_t slots_used_ = 0;
    std::vector<char> is_held_;
    std::vector<char> is_loaded_;
    std::array<std::int32_t, most_lanes> piece_{};
    LaneSpeeds work_{};
    LaneSpeeds begin_s_{};
    Queue downcasts_;
    Queue uploads_;
    Queue flushes_;
    std::vector<double> releases_;
    std::size_t released_ = 0;
    std::size_t lanes_;
    std::size_t stored_next_ = 0; // places in the order of stored pieces: next to update ...
    std::size_t stored_done_ = 0;
    std::size_t read_next_ = 0; // ... and next to read
    std::size_t buffers_free_ = 0;
    std::vector<char> is_arrived_;
    std::vector<char> is_staying_;
    std::vector<Queue> transfers_; // of each path: to be read, to be written
    Outcome result_;
};

} // namespace

Outcome Simulator::run(const Job &job, bool is_traced) {
    check_job(sizes_, job);
    Run run(sizes_, rates_, job, is_traced);
    while (true) {
        run.start();
        const unsigned mask = run.mask();
        const double wake_s = run.next_release_s();
        if (mask != 0) {
            run.advance(speeds(mask), wake_s);
        } else if (wake_s < never) {
            run.sleep_until(wake_s);
        } else {
            return run.finish();
        }
    }
}

} // namespace lowtide::offload
