// Entry point of the extension module. setup.py names the module and lists every folder of csrc/
// that has a bind.cpp, so a plugin joins by dropping its folder in:
//     LOWTIDE_MODULE         _native, or _native_cuda for what needs the CUDA runtime
//     LOWTIDE_BIND_PREFIX    bind_, or bind_cuda_
//     LOWTIDE_FOLDERS(X)     X(common) X(offload) ...
// and each folder's bind.cpp defines `void bind_<folder>(pybind11::module_ &)`.
#include <pybind11/pybind11.h>

#ifndef LOWTIDE_MODULE // so that an editor can parse this file on its own
#define LOWTIDE_MODULE _native
#define LOWTIDE_BIND_PREFIX bind_
#define LOWTIDE_FOLDERS(X) X(common)
#endif

#define LOWTIDE_JOIN_(a, b) a##b
#define LOWTIDE_JOIN(a, b) LOWTIDE_JOIN_(a, b)

#define LOWTIDE_DECLARE(folder) void LOWTIDE_JOIN(LOWTIDE_BIND_PREFIX, folder)(pybind11::module_ &);
LOWTIDE_FOLDERS(LOWTIDE_DECLARE)

#define LOWTIDE_BIND(folder)                                                                       \
    {                                                                                              \
        pybind11::module_ sub = module.def_submodule(#folder);                                     \
        LOWTIDE_JOIN(LOWTIDE_BIND_PREFIX, folder)(sub);                                            \
    }

PYBIND11_MODULE(LOWTIDE_MODULE, module) {
    module.doc() = "Native code of Lowtide, one submodule per plugin.";
    LOWTIDE_FOLDERS(LOWTIDE_BIND)
}
