// Python face of csrc/common: checks only, the work happens with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "cpu_features.hpp"
#include "crc32.hpp"
#include "crc32c.hpp"

namespace py = pybind11;

namespace {

// A Python integer as an unsigned C++ one, or a ValueError that says what is allowed.
template <typename T> T unsigned_argument(const py::int_ &value, const char *name) {
    const unsigned long long wide = PyLong_AsUnsignedLongLong(value.ptr());
    const bool overflowed = PyErr_Occurred() != nullptr;
    if (overflowed) {
        PyErr_Clear();
    }
    if (overflowed || wide > std::numeric_limits<T>::max()) {
        throw py::value_error(std::string(name) + ": got " + std::string(py::str(value)) +
                              ", allowed is 0 to " + std::to_string(std::numeric_limits<T>::max()));
    }
    return static_cast<T>(wide);
}

using Checksum = std::uint32_t (*)(lowtide::ConstBytes, std::uint32_t);

template <Checksum checksum> std::uint32_t run(const py::object &data, const py::int_ &seed) {
    const lowtide::ReadBuffer buffer(data, "data");
    const auto start = unsigned_argument<std::uint32_t>(seed, "seed");
    const py::gil_scoped_release unlocked;
    return checksum(buffer.bytes(), start);
}

using Combination = std::uint32_t (*)(std::uint32_t, std::uint32_t, std::uint64_t);

template <Combination combination>
std::uint32_t combine(const py::int_ &crc_a, const py::int_ &crc_b, const py::int_ &length_b) {
    return combination(unsigned_argument<std::uint32_t>(crc_a, "crc_a"),
                       unsigned_argument<std::uint32_t>(crc_b, "crc_b"),
                       unsigned_argument<std::uint64_t>(length_b, "length_b"));
}

std::vector<std::string> cpu_feature_names() {
    const lowtide::CpuFeatures &found = lowtide::cpu_features();
    std::vector<std::string> names;
    const auto add = [&names](bool present, const char *name) {
        if (present) {
            names.emplace_back(name);
        }
    };
    add(found.sse42, "sse4.2");
    add(found.pclmul, "pclmul");
    add(found.avx2, "avx2");
    add(found.avx512, "avx512");
    return names;
}

} // namespace

void bind_common(py::module_ &module) {
    module.def("crc32c", &run<lowtide::crc32c>, py::arg("data"), py::arg("seed") = 0,
               "CRC32C of the bytes of `data`, continuing from the checksum `seed`.");
    module.def("crc32c_portable", &run<lowtide::crc32c_portable>, py::arg("data"),
               py::arg("seed") = 0, "As crc32c, always by tables.");
    module.def("crc32c_sse42", &run<lowtide::crc32c_sse42>, py::arg("data"), py::arg("seed") = 0,
               "As crc32c, always by the SSE4.2 instruction; RuntimeError where there is none.");
    module.def("crc32c_combine", &combine<lowtide::crc32c_combine>, py::arg("crc_a"),
               py::arg("crc_b"), py::arg("length_b"),
               "Checksum of A followed by B, from their checksums and B's length in bytes.");
    module.def("crc32c_implementation", &lowtide::crc32c_implementation,
               "What crc32c uses on this processor: 'sse4.2' or 'portable'.");
    module.def("crc32", &run<lowtide::crc32>, py::arg("data"), py::arg("seed") = 0,
               "zip's CRC-32 of the bytes of `data`, continuing from the checksum `seed`.");
    module.def("crc32_portable", &run<lowtide::crc32_portable>, py::arg("data"),
               py::arg("seed") = 0, "As crc32, always by tables.");
    module.def("crc32_pclmul", &run<lowtide::crc32_pclmul>, py::arg("data"), py::arg("seed") = 0,
               "As crc32, always by PCLMULQDQ; RuntimeError where there is none.");
    module.def("crc32_combine", &combine<lowtide::crc32_combine>, py::arg("crc_a"),
               py::arg("crc_b"), py::arg("length_b"),
               "Checksum of A followed by B, from their checksums and B's length in bytes.");
    module.def("crc32_implementation", &lowtide::crc32_implementation,
               "What crc32 uses on this processor: 'pclmul' or 'portable'.");
    module.def("cpu_features", &cpu_feature_names,
               "Instruction sets of this processor that native kernels choose between.");
}
