// How Python memory reaches native code: any object with the buffer protocol, as a span.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "span.hpp"

namespace lowtide {

// Holds a read-only, C-contiguous view of an object's memory. While it lives, the object cannot
// be resized or freed, so the GIL may be released. Create and destroy it with the GIL held.
class ReadBuffer {
  public:
    // `name` is the argument's name in error messages. Raises TypeError for an object without
    // the buffer protocol or with Python objects in it, ValueError for one with gaps.
    ReadBuffer(const pybind11::object &object, const std::string &name) {
        if (PyObject_CheckBuffer(object.ptr()) == 0) {
            throw pybind11::type_error(name + ": got " + type_name(object) +
                                       ", allowed is any object with the buffer protocol (bytes, "
                                       "bytearray, memoryview, numpy array); for a torch tensor "
                                       "pass tensor.numpy()");
        }
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
            throw pybind11::error_already_set();
        }
        const bool holds_objects = view_.format != nullptr && std::strchr(view_.format, 'O');
        if (holds_objects || PyBuffer_IsContiguous(&view_, 'C') == 0) {
            PyBuffer_Release(&view_);
            if (holds_objects) {
                throw pybind11::type_error(name + ": got " + type_name(object) +
                                           " that holds Python objects, allowed are plain numbers "
                                           "or bytes");
            }
            throw pybind11::value_error(name + ": got a " + type_name(object) +
                                        " that is not C-contiguous; pass "
                                        "numpy.ascontiguousarray(x) or bytes(x)");
        }
    }

    ~ReadBuffer() { PyBuffer_Release(&view_); }

    ReadBuffer(const ReadBuffer &) = delete;
    ReadBuffer &operator=(const ReadBuffer &) = delete;

    ConstBytes bytes() const {
        return ConstBytes(static_cast<const unsigned char *>(view_.buf),
                          view_.buf == nullptr ? 0 : static_cast<std::size_t>(view_.len));
    }

  private:
    static std::string type_name(const pybind11::object &object) {
        return Py_TYPE(object.ptr())->tp_name;
    }

    Py_buffer view_{};
};

} // namespace lowtide
