// The arguments of conv1x1 and flow_step as their CUDA kernels take them.
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "cuda/channel_mix.cuh"
#include "cuda/tensor.cuh"

namespace hflow::cuda {

struct MixInputs {
  MemoryFormat format;
  Tensor x, weight, bias;  // x dense in `format`; weight and bias contiguous, in the compute type
  MixShape shape;

  MixInputs(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) : format(format_of(x)) {
    check_mix(op, x, weight, bias);
    this->x = as_format(x, format);
    this->weight = as_type(weight, compute_type(x.scalar_type()));
    this->bias = as_type(bias, compute_type(x.scalar_type()));
    const int64_t pixels = pixels_of(x);
    shape = {x.size(0), static_cast<int>(x.size(1)), pixels, format == MemoryFormat::Contiguous && pixels > 1};
  }
};

}  // namespace hflow::cuda
