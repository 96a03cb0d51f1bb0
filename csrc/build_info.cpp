// The Python module: importing it loads the library, which registers the ops; build_info() says what it contains.
//
// pybind11 is no part of torch's stable ABI, and the copy among torch's headers refuses to be included beside it. This
// file includes nothing of torch, so the two do not meet.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include <string>

#include "build_stamp.h"
#include "common/isa.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of hflow_fast; importing it registers torch.ops.hflow_fast.";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = std::string(
#if defined(__clang__)
            "clang "
#else
            "gcc "
#endif
            __VERSION__);
#if defined(__x86_64__)
        info["vector_widths"] = "avx512, avx2, baseline";
#else
        info["vector_widths"] = "baseline";
#endif
        info["vector_selected"] = hflow::isa_name(hflow::isa());
        info["cuda_archs"] = HFLOW_CUDA_ARCHS;
        info["torch_target"] = "2.11";
        info["torch_build"] = HFLOW_BUILD_TORCH;
        info["git_commit"] = HFLOW_GIT_COMMIT;
        return info;
      },
      "What this build contains: compiler, vector widths compiled and in use, CUDA architectures, torch, commit.");
}
