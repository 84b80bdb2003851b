// Launchers of the CUDA kernels of multi-scale deformable attention, free of PyTorch. They only queue work on `stream`.
//
// Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ms_deform_attn {

constexpr int kMaxLevels = 32;       // levels travel by value among the kernels' arguments
constexpr int kMaxPoints = 1 << 16;  // of one level; see `find_point`

// Type of values. Locations and weights are double if values are, else float.
enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

// No size may be 0, and the values of an image, S M D / `vec_of`, may have no more than 2^32 - 1 steps. Every tensor is dense
// and aligned to 16 bytes.
struct Sizes {
  int batch, tokens, heads, channels, queries, num_levels, points;
  int heights[kMaxLevels], widths[kMaxLevels];
};

// Channels that a lane moves at once: 16 bytes, or one channel if a head has no whole number of those.
constexpr int vec_of(Type type, int channels) {
  const int vec = type == Type::kDouble ? 2 : type == Type::kFloat ? 4 : 8;
  return channels % vec == 0 ? vec : 1;
}

struct Inputs {
  const void *value, *locations, *weights;
};

// The sums of grad_value, [N, S, M, D], filled with zeros by the caller: as float (double for double values) in `sums`; or, if
// `fixed_sums` is given, in fixed point, where the result does not depend on the order of the additions.
struct GradValue {
  void* sums;
  int64_t* fixed_sums;
  const double* bound;  // on the device: upper bound of the sum of absolute contributions to an element
};

cudaError_t launch_forward(Type type, const Sizes& sizes, const Inputs& inputs, void* output, cudaStream_t stream);

// Writes every element of grad_locations and grad_weights.
cudaError_t launch_backward(Type type, const Sizes& sizes, const Inputs& inputs, const void* grad_output,
                            const GradValue& grad_value, void* grad_locations, void* grad_weights, cudaStream_t stream);

// Converts `count` fixed-point sums to values of `type`, which are all NaN if the bound is not finite.
cudaError_t launch_from_fixed(Type type, const GradValue& grad_value, int64_t count, void* values, cudaStream_t stream);

}  // namespace ms_deform_attn
