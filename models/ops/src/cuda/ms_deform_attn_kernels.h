// Launchers of the CUDA kernels of multi-scale deformable attention, free of PyTorch. They only queue work on `stream`.
//
// Letters: N pictures, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ms_deform_attn {

constexpr int kMaxLevels = 32;       // levels travel by value among the kernel's arguments
constexpr int kMaxPoints = 1 << 16;  // of one level; see `level_of` in the kernels

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };  // of values; the rest is float, or double beside double

struct Level {
  int height, width;
  int start, first_tile;  // first token, first block of queries: set by the launcher
};

// None is zero. All of it is dense and its first byte lies at a multiple of 16.
struct Sizes {
  int64_t batch;
  int tokens, heads, channels, queries, num_levels, points;
  Level levels[kMaxLevels];
};

// Sums of grad_value, zero-filled by the caller, [N, S, M, D]: in `sums` as float, or double for double values; or, where
// `fixed_sums` is given, as 64-bit fixed point, whose bits do not depend on the order of the additions.
struct GradValue {
  void* sums;
  int64_t* fixed_sums;
  const double* bound;  // on the device: no |sum| of grad_value is above it, nor any sum of parts of it
};

struct Inputs {
  const void *value, *locations, *weights;
};

cudaError_t launch_forward(Type type, const Sizes& sizes, const Inputs& inputs, void* output, cudaStream_t stream);

// Writes every element of grad_locations and grad_weights.
cudaError_t launch_backward(Type type, const Sizes& sizes, const Inputs& inputs, const void* grad_output,
                            const GradValue& grad_value, void* grad_locations, void* grad_weights, cudaStream_t stream);

// Fixed-point sums as values of `type`; NaN everywhere if the bound is not finite.
cudaError_t launch_from_fixed(Type type, const GradValue& grad_value, int64_t count, void* values, cudaStream_t stream);

}  // namespace ms_deform_attn
