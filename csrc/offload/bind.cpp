// Python face of csrc/offload.
#include <pybind11/pybind11.h>

void bind_schedule(pybind11::module_ &module);

void bind_offload(pybind11::module_ &module) { bind_schedule(module); }
