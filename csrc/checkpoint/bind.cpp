// Python face of csrc/checkpoint: checks only. Every wait happens with the GIL released, and no
// thread of the writer ever takes it. All other calls keep it: the writer's lock is never held
// for long, and a daemon thread must not be in here when the interpreter ends, because it would be
// unwound from where it takes the GIL again, which C++ answers by ending the process.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "records.hpp"
#include "writer.hpp"

namespace py = pybind11;

namespace {

using lowtide::checkpoint::Failure;
using lowtide::checkpoint::FileSpec;
using lowtide::checkpoint::Job;
using lowtide::checkpoint::JobState;
using lowtide::checkpoint::Stretch;
using lowtide::checkpoint::WriterFacts;
using lowtide::checkpoint::WriterOptions;
using NativeWriter = lowtide::checkpoint::Writer;

// Counts the forks between the first process and this one. A child has none of the writer's
// threads, and its locks may be held for ever.
std::atomic<int> generation{0};

class Handle {
  public:
    explicit Handle(std::shared_ptr<NativeWriter> writer) : writer_(std::move(writer)) {}

    Handle(Handle &&) = default;

    ~Handle() {
        if (!is_of_this_process()) { // nothing of it can be ended or freed here
            [[maybe_unused]] auto *leaked =
                new std::shared_ptr<NativeWriter>(std::move(writer_)); // NOLINT
        }
    }

    bool is_of_this_process() const { return generation_ == generation; }

    const std::shared_ptr<NativeWriter> &get() const {
        if (!is_of_this_process()) {
            throw std::runtime_error("this checkpoint writer belongs to the parent process; open "
                                     "one of its own in each process, after the fork");
        }
        return writer_;
    }

  private:
    std::shared_ptr<NativeWriter> writer_;
    int generation_ = generation;
};

class Ticket {
  public:
    Ticket(std::shared_ptr<NativeWriter> writer, std::shared_ptr<Job> job)
        : writer_(std::move(writer)), job_(std::move(job)) {}

    ~Ticket() {
        if (!writer_.is_of_this_process()) {
            [[maybe_unused]] auto *leaked = new std::shared_ptr<Job>(std::move(job_)); // NOLINT
        }
    }

    bool wait_captured(double timeout_s) { return writer_.get()->wait_captured(job_, timeout_s); }
    bool wait_released(const std::vector<Stretch> &memory, double timeout_s) {
        return writer_.get()->wait_released(job_, memory, timeout_s);
    }
    void hurry(const std::vector<Stretch> &memory) { writer_.get()->hurry(job_, memory); }
    bool wait_durable(double timeout_s) { return writer_.get()->wait_settled(*job_, timeout_s); }
    void extend(FileSpec spec, bool is_partial) {
        const std::shared_ptr<NativeWriter> &writer = writer_.get();
        spec.prepare();
        writer->extend(job_, std::move(spec), is_partial);
    }
    void cancel() { writer_.get()->cancel(*job_); }
    JobState state() { return writer_.get()->state(*job_); }
    std::vector<std::vector<std::uint32_t>> results() { return writer_.get()->results(*job_); }

  private:
    Handle writer_;
    std::shared_ptr<Job> job_;
};

class Writer {
  public:
    explicit Writer(const WriterOptions &options) : handle_(NativeWriter::open(options)) {}

    ~Writer() {
        if (handle_.is_of_this_process()) {
            const py::gil_scoped_release unlocked;
            handle_.get()->close(0);
        }
    }

    std::unique_ptr<Ticket> submit(std::vector<FileSpec> specs, bool is_partial) {
        const std::shared_ptr<NativeWriter> &writer = handle_.get();
        for (FileSpec &spec : specs) {
            spec.prepare();
        }
        if (is_partial && specs.size() != 1) {
            throw py::value_error("plans: got " + std::to_string(specs.size()) +
                                  ", allowed is one where it is partial");
        }
        return std::make_unique<Ticket>(writer, writer->submit(std::move(specs), is_partial));
    }

    bool close(double deadline_s) { return handle_.get()->close(deadline_s); }
    WriterFacts facts() { return handle_.get()->facts(); }

  private:
    Handle handle_;
};

// An array of exactly this type and number of dimensions, without gaps.
template <typename T>
py::array_t<T> array_argument(const py::handle &value, const std::string &path, const char *name,
                              py::ssize_t dimensions = 1) {
    const bool is_array = py::isinstance<py::array_t<T, py::array::c_style>>(value);
    if (!is_array || py::reinterpret_borrow<py::array>(value).ndim() != dimensions) {
        const bool has_type = py::isinstance<py::array>(value);
        const std::string found = has_type ? std::string(py::str(value.attr("dtype"))) +
                                                 " array of shape " +
                                                 std::string(py::str(value.attr("shape")))
                                           : std::string(Py_TYPE(value.ptr())->tp_name);
        throw py::value_error("plan of " + path + ": " + name + ": got " + found +
                              ", allowed is a C-contiguous numpy array of " +
                              std::string(py::str(py::dtype::of<T>())) + " with " +
                              std::to_string(dimensions) + " dimension(s)");
    }
    return py::reinterpret_borrow<py::array_t<T>>(value);
}

template <typename T>
std::vector<T> vector_argument(const py::handle &value, const std::string &path, const char *name) {
    const auto array = array_argument<T>(value, path, name);
    return std::vector<T>(array.data(), array.data() + array.size());
}

FileSpec spec_of(const py::tuple &plan) {
    if (plan.size() != 9) {
        throw py::value_error("plan: got a tuple of " + std::to_string(plan.size()) +
                              ", allowed is (path, size, offsets, lengths, addresses, entries, "
                              "literals, patches, expected_size)");
    }
    FileSpec spec;
    spec.path = plan[0].cast<std::string>();
    spec.size = plan[1].cast<std::uint64_t>();
    spec.offsets = vector_argument<std::uint64_t>(plan[2], spec.path, "offsets");
    spec.lengths = vector_argument<std::uint64_t>(plan[3], spec.path, "lengths");
    spec.addresses = vector_argument<std::uint64_t>(plan[4], spec.path, "addresses");
    spec.entries = vector_argument<std::int32_t>(plan[5], spec.path, "entries");
    const auto literals = array_argument<std::uint8_t>(plan[6], spec.path, "literals");
    spec.literals_address = reinterpret_cast<std::uintptr_t>(literals.data());
    spec.literals_bytes = static_cast<std::uint64_t>(literals.size());
    const auto patches = array_argument<std::uint64_t>(plan[7], spec.path, "patches", 2);
    if (patches.shape(1) != 2) {
        throw py::value_error("plan of " + spec.path + ": patches: got shape (" +
                              std::to_string(patches.shape(0)) + ", " +
                              std::to_string(patches.shape(1)) + "), allowed is (n, 2)");
    }
    for (py::ssize_t i = 0; i < patches.shape(0); ++i) {
        if (patches.at(i, 1) > 0x7FFFFFFFu) {
            throw py::value_error("plan of " + spec.path + ": patches[" + std::to_string(i) +
                                  ", 1]: got " + std::to_string(patches.at(i, 1)) +
                                  ", allowed is the number of an entry");
        }
        spec.patches.push_back({patches.at(i, 0), static_cast<std::uint32_t>(patches.at(i, 1))});
    }
    spec.expected = plan[8].cast<std::uint64_t>();
    return spec;
}

std::unique_ptr<Ticket> submit(Writer &writer, const std::vector<py::tuple> &plans,
                               bool is_partial) {
    std::vector<FileSpec> specs;
    specs.reserve(plans.size());
    for (const py::tuple &plan : plans) {
        specs.push_back(spec_of(plan));
    }
    return writer.submit(std::move(specs), is_partial);
}

std::vector<Stretch> memory_of(const py::handle &value) {
    const auto array = array_argument<std::uint64_t>(value, "memory", "stretches", 2);
    if (array.shape(1) != 2) {
        throw py::value_error("memory: got " + std::to_string(array.shape(1)) +
                              " columns, allowed are begin and end");
    }
    std::vector<Stretch> memory;
    for (py::ssize_t i = 0; i < array.shape(0); ++i) {
        memory.push_back({array.at(i, 0), array.at(i, 1)});
    }
    return memory;
}

py::bytes bytes_of(const std::vector<std::int64_t> &numbers) {
    return py::bytes(reinterpret_cast<const char *>(numbers.data()),
                     numbers.size() * sizeof(std::int64_t));
}

py::tuple lay_out_records(const py::array &addresses, const py::array &sizes, std::uint64_t number,
                          std::uint64_t offset, std::uint64_t literals, std::uint64_t central) {
    const auto places = array_argument<std::uint64_t>(addresses, "records", "addresses");
    const auto lengths = array_argument<std::uint64_t>(sizes, "records", "sizes");
    if (places.size() != lengths.size()) {
        throw py::value_error("records: addresses and sizes differ in their number of elements");
    }
    const auto count = static_cast<std::size_t>(places.size());
    const lowtide::checkpoint::Records made = lowtide::checkpoint::lay_out_records(
        places.data(), lengths.data(), count, {number, offset, literals, central});
    return py::make_tuple(py::bytes(made.literals), py::bytes(made.central), bytes_of(made.pieces),
                          bytes_of(made.patches), bytes_of(made.central_patches), made.offset);
}

py::dict state_dict(Ticket &ticket) {
    const JobState state = ticket.state();
    py::dict result;
    result["total_bytes"] = state.total_bytes;
    result["captured_bytes"] = state.captured_bytes;
    result["written_bytes"] = state.written_bytes;
    result["staged_bytes"] = state.staged_bytes;
    result["direct_bytes"] = state.direct_bytes;
    result["hurried_bytes"] = state.hurried_bytes;
    result["is_captured"] = state.is_captured;
    result["captured_chunks"] = state.captured_chunks;
    result["is_released"] = state.is_released;
    result["is_settled"] = state.is_durable || state.failure;
    result["is_durable"] = state.is_durable;
    result["capture_end_s"] = state.capture_end_s;
    result["durable_end_s"] = state.durable_end_s;
    result["idle_s"] = state.idle_s;
    result["error"] = py::none();
    if (state.failure) {
        result["error"] = py::make_tuple(state.failure->operation, py::bytes(state.failure->path),
                                         state.failure->error, state.failure->wanted_bytes);
    }
    return result;
}

py::dict facts_dict(Writer &writer) {
    const WriterFacts facts = writer.facts();
    py::dict result;
    result["io"] = facts.io;
    result["io_reason"] = facts.io_reason;
    result["is_direct"] = facts.is_direct;
    result["direct_reason"] = facts.direct_reason;
    result["buffer_bytes"] = facts.buffer_bytes;
    result["touched_bytes"] = facts.touched_bytes;
    result["chunk_bytes"] = facts.chunk_bytes;
    return result;
}

std::unique_ptr<Writer> open_writer(std::size_t buffer_bytes, std::size_t chunk_bytes,
                                    const std::string &io, bool direct, int queue_depth,
                                    double bytes_per_s) {
    return std::make_unique<Writer>(
        WriterOptions{buffer_bytes, chunk_bytes, io, direct, queue_depth, bytes_per_s});
}

} // namespace

void bind_checkpoint(py::module_ &module) {
    module.def("lay_out_records", &lay_out_records, py::arg("addresses"), py::arg("sizes"),
               py::arg("number"), py::arg("offset"), py::arg("literals"), py::arg("central"),
               "Headers and places of zip members with these bytes: (literals, central directory, "
               "pieces, patches, patches of the directory, offset behind them).");

    pthread_atfork(nullptr, nullptr, [] { ++generation; });
    using Unlocked = py::call_guard<py::gil_scoped_release>;

    py::class_<Ticket>(module, "Ticket")
        .def("wait_captured", &Ticket::wait_captured, py::arg("timeout_s") = -1.0, Unlocked(),
             "Wait until nobody reads the job's live memory, also after an error; False if the "
             "time is over first, negative waits for ever.")
        .def(
            "wait_released",
            [](Ticket &ticket, const py::handle &memory, double timeout_s) {
                const std::vector<Stretch> wanted = memory_of(memory);
                const py::gil_scoped_release unlocked;
                return ticket.wait_released(wanted, timeout_s);
            },
            py::arg("memory"), py::arg("timeout_s") = -1.0,
            "Capture what lies in this memory first, and wait until nobody reads it any more, also "
            "after an error; False if the time is over first, negative waits for ever.")
        .def(
            "hurry",
            [](Ticket &ticket, const py::handle &memory) { ticket.hurry(memory_of(memory)); },
            py::arg("memory"), "Capture what lies in this memory before everything else.")
        .def("wait_durable", &Ticket::wait_durable, py::arg("timeout_s") = -1.0, Unlocked(),
             "Wait until the job is durable or has failed; False if the time is over first.")
        .def(
            "extend",
            [](Ticket &ticket, const py::tuple &plan, bool is_partial) {
                ticket.extend(spec_of(plan), is_partial);
            },
            py::arg("plan"), py::arg("is_partial"),
            "More, or all, of a file of which the beginning was submitted.")
        .def("cancel", &Ticket::cancel, "Stop capturing; the job fails.")
        .def("state", &state_dict, "The job's numbers, as a dict.")
        .def("results", &Ticket::results, "CRC-32 of each chunk of each file.");

    py::class_<Writer>(module, "Writer")
        .def(py::init(&open_writer), py::arg("buffer_bytes"), py::arg("chunk_bytes"),
             py::arg("io") = "auto", py::arg("direct") = true, py::arg("queue_depth") = 8,
             py::arg("bytes_per_s") = 0.0)
        .def("submit", &submit, py::arg("plans"), py::arg("is_partial") = false,
             "Begin to write files, each (path, size, offsets, lengths, addresses, entries, "
             "literals, patches); the caller keeps their memory until they are captured. Of a "
             "partial one, which is alone, the rest comes with extend().")
        .def("close", &Writer::close, py::arg("deadline_s"), Unlocked(),
             "Let jobs finish until the deadline, cancel the others, end all threads. False if a "
             "thread hangs in the kernel and was left behind.")
        .def("facts", &facts_dict, "What is in use, as a dict.");
}
