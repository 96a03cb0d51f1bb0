// lu on CUDA tensors: checks, allocation, device guard, current stream. The kernel is in lu.cuh.
#include "cuda/lu.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "cuda/tensor.cuh"

namespace hflow {
namespace {

cuda::LuType lu_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return cuda::LuType::float64;
    case ScalarType::BFloat16: return cuda::LuType::bfloat16;
    case ScalarType::Half: return cuda::LuType::float16;
    default: return cuda::LuType::float32;
  }
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> factor_stacks(const char* op, std::vector<Tensor> weights) {
  std::vector<Tensor> log_abs_dets, inverses;
  std::vector<cuda::LuStack> stacks;
  if (weights.empty()) return {log_abs_dets, inverses};
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  for (Tensor& weight : weights) {
    check_matrices(op, weight);
    if (!(weight.device() == weights[0].device())) fail(op, "weights must be on one device");
    const int64_t dim = weight.dim(), n = weight.size(dim - 1), count = dim == 3 ? weight.size(0) : 1;
    if (n > cuda::kLuSharedSize)
      fail(op, "weight must have at most ", cuda::kLuSharedSize, " rows, got ", shape_of(weight));
    weight = as_format(weight, MemoryFormat::Contiguous);
    const ScalarType type = compute_type(weight.scalar_type());
    log_abs_dets.push_back(dim == 3 ? empty(weight, {count}, type) : empty(weight, {}, type));
    inverses.push_back(dim == 3 ? empty(weight, {count, n, n}, type) : empty(weight, {n, n}, type));
    stacks.push_back({weight.data_ptr(), log_abs_dets.back().data_ptr(), inverses.back().data_ptr(), count,
                      static_cast<int>(n), lu_type(weight.scalar_type())});
  }
  cuda::check(cuda::lu_factor(stacks.data(), static_cast<int64_t>(stacks.size()), cuda::current_stream(weights[0])));
  return {log_abs_dets, inverses};
}

std::tuple<Tensor, Tensor> lu_fwd(Tensor weight) {
  const auto [log_abs_dets, inverses] = factor_stacks("lu", {weight});
  return {log_abs_dets[0], inverses[0]};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> lu_many_fwd(std::vector<Tensor> weights) {
  return factor_stacks("lu_many", weights);
}

}  // namespace
}  // namespace hflow

STABLE_TORCH_LIBRARY_IMPL(hflow_fast, CUDA, m) {
  m.impl("lu_fwd", TORCH_BOX(&hflow::lu_fwd));
  m.impl("lu_many_fwd", TORCH_BOX(&hflow::lu_many_fwd));
}
