// What the CUDA host functions share: typed pointers into tensors, the current stream, errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/tensor.h"
#include "cuda/device.cuh"

namespace hflow::cuda {

// Calls f(S{}, T{}) with the device type of `type`, which check_floating has accepted, and the type it is computed in.
template <class F>
void visit_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{}, float{});
    case ScalarType::Half: return f(__half{}, float{});
    default: return f(float{}, float{});
  }
}

template <class S>
S* data(const Tensor& tensor) {
  return static_cast<S*>(tensor.data_ptr());
}

// Of that dtype and dense in that format; the tensor itself where it already is.
inline Tensor as_type(const Tensor& tensor, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
  return as_format(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type), format);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error) { STD_CUDA_CHECK(error); }

}  // namespace hflow::cuda
