// Multi-scale deformable attention on CUDA: checks the tensors, allocates the results and launches the kernels. Nothing here
// waits for the device.
//
// Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "ms_deform_attn_kernels.h"

namespace {

namespace kernels = ms_deform_attn;

kernels::Type type_of(const at::Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat: return kernels::Type::kFloat;
    case at::kDouble: return kernels::Type::kDouble;
    case at::kHalf: return kernels::Type::kHalf;
    case at::kBFloat16: return kernels::Type::kBFloat16;
    default:
      TORCH_CHECK(false, "ms_deform_attn: value must be float32, float64, float16 or bfloat16, not ", value.scalar_type());
  }
}

int to_int(int64_t number, const char* what) {
  TORCH_CHECK(number <= std::numeric_limits<int>::max(), "ms_deform_attn: ", number, " ", what, " are more than 2^31 - 1");
  return static_cast<int>(number);
}

kernels::Sizes check_sizes(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                           const at::Tensor& weights) {
  TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be [N, S, M, D], not ", value.sizes());
  TORCH_CHECK(locations.dim() == 6 && locations.size(5) == 2,
              "ms_deform_attn: sampling_locations must be [N, Q, M, L, P, 2], not ", locations.sizes());
  TORCH_CHECK(locations.size(0) == value.size(0) && locations.size(2) == value.size(2), "ms_deform_attn: value ", value.sizes(),
              " and sampling_locations ", locations.sizes(), " differ in images or heads");
  TORCH_CHECK(weights.sizes() == locations.sizes().slice(0, 5), "ms_deform_attn: attention_weights must be ",
              locations.sizes().slice(0, 5), ", not ", weights.sizes());
  const int64_t num_levels = locations.size(3), num_points = locations.size(4);
  TORCH_CHECK(static_cast<int64_t>(shapes.size()) == 2 * num_levels, "ms_deform_attn: sampling_locations have ", num_levels,
              " levels, spatial_shapes ", shapes, " must list a height and a width for each");
  TORCH_CHECK(num_levels <= kernels::kMaxLevels && num_points <= kernels::kMaxPoints, "ms_deform_attn: ", num_levels,
              " levels of ", num_points, " points are more than the CUDA kernels take, ", kernels::kMaxLevels, " of ",
              kernels::kMaxPoints);
  kernels::Sizes sizes = {};
  sizes.batch = to_int(value.size(0), "images"), sizes.tokens = to_int(value.size(1), "tokens");
  sizes.heads = to_int(value.size(2), "heads"), sizes.channels = to_int(value.size(3), "channels");
  sizes.queries = to_int(locations.size(1), "queries");
  sizes.num_levels = static_cast<int>(num_levels), sizes.points = static_cast<int>(num_points);
  to_int(value.size(2) * value.size(3), "channels of all heads");
  int64_t tokens = 0;
  for (int64_t l = 0; l < num_levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    constexpr int64_t longest = 1 << 24;  // float positions tell neighbouring pixels apart up to here
    TORCH_CHECK(height > 0 && width > 0 && height <= longest && width <= longest, "ms_deform_attn: level ", l,
                " must have sides from 1 to 2^24: ", shapes);
    sizes.heights[l] = static_cast<int>(height), sizes.widths[l] = static_cast<int>(width);
    tokens += height * width;
  }
  TORCH_CHECK(tokens == value.size(1), "ms_deform_attn: the levels ", shapes, " have ", tokens, " tokens, value has ",
              value.size(1));
  return sizes;
}

// What a call needs, after all checks; tensors are dense and begin at a multiple of 16 bytes.
struct Call {
  kernels::Type type;
  kernels::Sizes sizes;
  at::Tensor value, locations, weights;
  kernels::Inputs inputs;
};

at::Tensor dense(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  const bool aligned = reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0;
  return aligned ? contiguous : contiguous.clone();
}

void check_companion(const at::Tensor& tensor, const char* name, const at::Tensor& value, at::ScalarType dtype) {
  TORCH_CHECK(tensor.device() == value.device(), "ms_deform_attn: ", name, " is on ", tensor.device(), ", value on ",
              value.device());
  TORCH_CHECK(tensor.scalar_type() == dtype, "ms_deform_attn: ", name, " must be ", dtype, " beside values of ",
              value.scalar_type(), ", not ", tensor.scalar_type());
}

Call check_call(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights) {
  TORCH_CHECK(value.is_cuda(), "ms_deform_attn: value is on ", value.device(), ", other tensors on a GPU");
  Call call = {type_of(value), check_sizes(value, shapes, locations, weights), {}, {}, {}, {}};
  const at::ScalarType dtype = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_companion(locations, "sampling_locations", value, dtype);
  check_companion(weights, "attention_weights", value, dtype);
  const int64_t steps = value.numel() / std::max<int64_t>(value.size(0), 1) / kernels::vec_of(call.type, call.sizes.channels);
  TORCH_CHECK(steps <= std::numeric_limits<uint32_t>::max(), "ms_deform_attn: images of ", value.sizes().slice(1),
              " values are too large for the CUDA kernels");
  call.value = dense(value), call.locations = dense(locations), call.weights = dense(weights);
  call.inputs = {call.value.const_data_ptr(), call.locations.const_data_ptr(), call.weights.const_data_ptr()};
  return call;
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights) {
  const Call call = check_call(value, shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor output = at::empty({value.size(0), locations.size(1), value.size(2) * value.size(3)}, value.options());
  if (output.numel() == 0) return output;
  if (weights.numel() == 0) return output.zero_();
  C10_CUDA_CHECK(kernels::launch_forward(call.type, call.sizes, call.inputs, output.mutable_data_ptr(),
                                         c10::cuda::getCurrentCUDAStream()));
  return output;
}

// Returns an upper bound of the sum of absolute contributions to any element of grad_value. A point contributes to a pixel once.
at::Tensor bound_of(const Call& call, const at::Tensor& grad_output) {
  const double num_contributions = static_cast<double>(call.sizes.queries) * call.sizes.points;
  return grad_output.abs().amax().to(at::kDouble) * call.weights.abs().amax().to(at::kDouble) * num_contributions;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Call call = check_call(value, shapes, locations, weights);
  check_companion(grad_output, "grad_output", value, value.scalar_type());
  TORCH_CHECK(grad_output.numel() == value.size(0) * locations.size(1) * value.size(2) * value.size(3),
              "ms_deform_attn: the gradient ", grad_output.sizes(), " does not fit value ", value.sizes(),
              " and sampling_locations ", locations.sizes());
  const c10::cuda::CUDAGuard guard(value.device());
  if (grad_output.numel() == 0 || weights.numel() == 0) {
    return {at::zeros(value.sizes(), value.options()), at::zeros(locations.sizes(), locations.options()),
            at::zeros(weights.sizes(), weights.options())};
  }
  const at::Tensor grad = dense(grad_output);
  const at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  const at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&](const kernels::GradValue& grad_value) {
    C10_CUDA_CHECK(kernels::launch_backward(call.type, call.sizes, call.inputs, grad.const_data_ptr(), grad_value,
                                            grad_locations.mutable_data_ptr(), grad_weights.mutable_data_ptr(), stream));
  };
  if (!at::globalContext().deterministicAlgorithms()) {
    const at::Tensor sums = at::zeros(value.sizes(), value.options().dtype(locations.scalar_type()));
    launch({sums.mutable_data_ptr(), nullptr, nullptr});
    return {sums.to(value.scalar_type()), grad_locations, grad_weights};
  }
  const at::Tensor sums = at::zeros(value.sizes(), value.options().dtype(at::kLong)), bound = bound_of(call, grad);
  const at::Tensor grad_value = at::empty(value.sizes(), value.options());
  const kernels::GradValue fixed = {nullptr, sums.mutable_data_ptr<int64_t>(), bound.const_data_ptr<double>()};
  launch(fixed);
  C10_CUDA_CHECK(kernels::launch_from_fixed(call.type, fixed, sums.numel(), grad_value.mutable_data_ptr(), stream));
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(detr, CUDA, library) {
  library.impl("ms_deform_attn", &forward);
  library.impl("ms_deform_attn_backward", &backward);
}
