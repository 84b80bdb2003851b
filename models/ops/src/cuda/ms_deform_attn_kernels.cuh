// CUDA kernels of multi-scale deformable attention (arXiv:2010.04159, Eq. 3).
//
// A group of lanes of one warp works on one head of one query; each lane holds a few channels, so that a pixel is read in
// one 16-byte load a lane. The lanes first share out the sampling points among themselves and leave, in shared memory, the
// four pixels of each and their weights; then all of them walk over these points, without branches. A block is one head of
// neighbouring queries, which sample the same pixels: in an encoder, where queries are pixels, a tile of one level.
//
// Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ms_deform_attn_kernels.h"

#ifndef VECTOR_ATOMICS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define VECTOR_ATOMICS 1
#else
#define VECTOR_ATOMICS 0
#endif
#endif

namespace ms_deform_attn {

constexpr int kTileWidth = 8;    // queries of a block side by side, where queries are pixels
constexpr unsigned kWarp = ~0u;  // all 32 lanes

constexpr int at_most(int a, int b) { return a < b ? a : b; }

struct Level {
  int height, width, start, first_block;
};

// The sizes of a call, and the way in which its queries are spread over blocks.
struct Layout {
  int batch, tokens, heads, channels, queries, num_levels, points;
  float inverse_points;
  bool tiled;  // queries are pixels
  Level levels[kMaxLevels];
};

// Compile-time constants of a kernel. VEC: channels that a lane moves at a time; LANES: lanes of a group, a power of 2 from 4 to
// 32; CHANNELS: channels of a head if they are known at compile time, else 0.
template <typename T, int VEC, int LANES, int CHANNELS>
struct Config {
  using Value = T;
  using Math = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVec = VEC, kLanes = LANES, kChannels = CHANNELS;
  static constexpr int kTile = at_most(2 * LANES, 16);  // points in shared memory at a time
  static constexpr int kForwardGroups = at_most(64, 512 / LANES), kBackwardGroups = at_most(32, 256 / LANES);  // per block
  static constexpr int kForwardThreads = kForwardGroups * LANES, kBackwardThreads = kBackwardGroups * LANES;
  // Smallest number of resident blocks per multiprocessor. It allows 64, 80 and (for sums of 8 bytes) 128 registers per thread,
  // with which no kernel spills.
  static constexpr int kForwardBlocks = 1024 / kForwardThreads;
  static constexpr int kBackwardBlocks = 768 / kBackwardThreads, kWideBackwardBlocks = 512 / kBackwardThreads;
};

// N neighbours, moved at once if they fill no more than 16 bytes.
template <typename T, int N>
struct alignas(at_most(sizeof(T) * N, 16)) Pack {
  T at[N];
};

template <int N, typename T>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// Advances `first` by steps of N elements. Counting in bytes needs a single multiplication for the 64-bit address.
template <int N, typename T>
__device__ T* step_from(T* first, unsigned steps) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + static_cast<uint64_t>(steps) * (N * sizeof(T)));
}

// Makes the compiler compute a pointer into global memory now; otherwise it adds up the pointer's parts again at every use.
template <typename T>
__device__ T* settle(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// The query of this thread's group, -1 beyond the last.
template <int LANES>
__device__ int find_query(const Layout& layout) {
  const int group = threadIdx.x / LANES, groups = blockDim.x / LANES, block = blockIdx.x;
  if (!layout.tiled) {
    const int query = block * groups + group;
    return query < layout.queries ? query : -1;
  }
  int index = 0;
  while (index + 1 < layout.num_levels && block >= layout.levels[index + 1].first_block) ++index;
  const Level level = layout.levels[index];
  const unsigned tile = block - level.first_block, tiles_across = (level.width - 1u) / kTileWidth + 1;
  const int x = tile % tiles_across * kTileWidth + group % kTileWidth;
  const int y = tile / tiles_across * (groups / kTileWidth) + group / kTileWidth;
  return x < level.width && y < level.height ? level.start + y * level.width + x : -1;
}

// A sampling point and its four pixels: upper left, upper right, lower left, lower right. All 0 if it touches none.
template <typename Math>
struct Point {
  unsigned present;   // bit i: pixel i is inside the level
  int tokens[4];      // a missing pixel is replaced by one that counts: no other, which may hold NaN, is read
  Math right, lower;  // distance from the upper left pixel
  Math weight, weight_times_width, weight_times_height;

  __device__ bool has(int corner) const { return present >> corner & 1; }
  __device__ Math bilinear(int corner) const {
    return (corner % 2 ? right : 1 - right) * (corner / 2 ? lower : 1 - lower);
  }
};

// Number `index` of the L P points of a head.
template <typename Math>
__device__ Point<Math> find_point(const Layout& layout, const Math* locations, const Math* weights, int index) {
  Point<Math> point = {};
  // The level is index / points. No rounding moves it: the product stays 0.5 / kMaxPoints away from any integer.
  const Level level = layout.levels[static_cast<int>((index + 0.5f) * layout.inverse_points)];
  const Pack<Math, 2> location = load<2>(locations + 2 * index);
  const Math x = location.at[0] * level.width - Math(0.5), y = location.at[1] * level.height - Math(0.5);
  if (!(x > -1 && y > -1 && x < level.width && y < level.height)) return point;  // and for NaN and infinity
  const Math column = floor(x), row = floor(y);
  const int x0 = static_cast<int>(column), y0 = static_cast<int>(row);
  const bool left = x0 >= 0, right = x0 + 1 < level.width, upper = y0 >= 0, lower = y0 + 1 < level.height;
  point.present = (upper & left) | (upper & right) << 1 | (lower & left) << 2 | (lower & right) << 3;
  const int upper_token = level.start + max(y0, 0) * level.width;
  const int lower_token = lower ? level.start + (y0 + 1) * level.width : upper_token;
  const int left_column = max(x0, 0), right_column = min(x0 + 1, level.width - 1);
  point.tokens[0] = upper_token + left_column, point.tokens[1] = upper_token + right_column;
  point.tokens[2] = lower_token + left_column, point.tokens[3] = lower_token + right_column;
  point.right = x - column, point.lower = y - row;
  point.weight = weights[index];
  point.weight_times_width = point.weight * level.width, point.weight_times_height = point.weight * level.height;
  return point;
}

// Points of a block, in shared memory. One column more than needed: groups of a warp read from different banks.
template <typename Math, int GROUPS, int TILE>
struct Corners {
  Pack<unsigned, 4> steps[GROUPS][TILE + 1];  // from the first pixel, in packs of channels
  Pack<Math, 4> weights[GROUPS][TILE + 1];    // attention weight times bilinear weight, 0 for a missing pixel

  __device__ void put(int group, int slot, const Point<Math>& point, unsigned steps_of_token) {
    Pack<unsigned, 4> step;
    Pack<Math, 4> weight;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      step.at[corner] = point.tokens[corner] * steps_of_token;
      weight.at[corner] = point.has(corner) ? point.weight * point.bilinear(corner) : 0;
    }
    steps[group][slot] = step;
    weights[group][slot] = weight;
  }
};

// Calls run(image, head) for all that this block works on.
template <typename Run>
__device__ void for_each_head(const Layout& layout, Run run) {
  for (int image = blockIdx.z; image < layout.batch; image += gridDim.z) {
    for (int head = blockIdx.y; head < layout.heads; head += gridDim.y) run(image, head);
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kForwardThreads, C::kForwardBlocks)
    forward_kernel(const typename C::Value* __restrict__ value, const typename C::Math* __restrict__ locations,
                   const typename C::Math* __restrict__ weights, typename C::Value* __restrict__ output,
                   const __grid_constant__ Layout layout) {
  using Value = typename C::Value;
  using Math = typename C::Math;
  __shared__ Corners<Math, C::kForwardGroups, C::kTile> corners;

  const int group = threadIdx.x / C::kLanes, lane = threadIdx.x % C::kLanes;
  const int channels = C::kChannels ? C::kChannels : layout.channels, num_points = layout.num_levels * layout.points;
  const int query = find_query<C::kLanes>(layout);

  for_each_head(layout, [&](int image, int head) {
    const int64_t slice = (static_cast<int64_t>(image) * layout.queries + max(query, 0)) * layout.heads + head;
    const int64_t origin = (static_cast<int64_t>(image) * layout.tokens * layout.heads + head) * channels;
    for (int first_channel = 0; first_channel < channels; first_channel += C::kLanes * C::kVec) {
      const int channel = first_channel + lane * C::kVec;
      const bool active = C::kChannels || channel < channels;
      const Value* pixels = settle(value + origin + channel);
      Math sum[C::kVec] = {};
      for (int first = 0; first < num_points; first += C::kTile) {
        int count = 0;  // points that touch a pixel: the others are left out
        __syncwarp();
#pragma unroll
        for (int slot = lane; slot - lane < C::kTile; slot += C::kLanes) {
          Point<Math> point = {};
          if (query >= 0 && slot < C::kTile && first + slot < num_points) {
            point = find_point(layout, locations + 2 * slice * num_points, weights + slice * num_points, first + slot);
          }
          const unsigned found = __ballot_sync(kWarp, point.present) >> (threadIdx.x % 32 - lane) & kWarp >> (32 - C::kLanes);
          const int earlier = __popc(found & ((1u << lane) - 1));
          if (point.present) corners.put(group, count + earlier, point, layout.heads * channels / C::kVec);
          count += __popc(found);
        }
        __syncwarp();
#pragma unroll 2
        for (int i = 0; i < (active ? count : 0); ++i) {
          const Pack<unsigned, 4> step = corners.steps[group][i];
          const Pack<Math, 4> weight = corners.weights[group][i];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const auto pixel = load<C::kVec>(step_from<C::kVec>(pixels, step.at[corner]));
#pragma unroll
            for (int j = 0; j < C::kVec; ++j) sum[j] += weight.at[corner] * widen(pixel.at[j]);
          }
        }
      }
      if (query < 0 || !active) continue;
      Pack<Value, C::kVec> result;
#pragma unroll
      for (int j = 0; j < C::kVec; ++j) narrow(sum[j], result.at[j]);
      *reinterpret_cast<Pack<Value, C::kVec>*>(output + slice * channels + channel) = result;
    }
  });
}

// Sums of four numbers over the lanes of a group; lane i * LANES / 4 returns that of number i. Halving the numbers with the
// lanes takes 4 shuffles for 8 lanes, where a sum of each would take 12.
template <int LANES, typename Math>
__device__ Math reduce_scatter(const Math (&number)[4], int lane) {
  const bool second_half = lane & LANES / 2, second_quarter = lane & LANES / 4;
  Math low = second_half ? number[2] : number[0], high = second_half ? number[3] : number[1];
  low += __shfl_xor_sync(kWarp, second_half ? number[0] : number[2], LANES / 2);
  high += __shfl_xor_sync(kWarp, second_half ? number[1] : number[3], LANES / 2);
  Math sum = second_quarter ? high : low;
  sum += __shfl_xor_sync(kWarp, second_quarter ? low : high, LANES / 4);
#pragma unroll
  for (int step = LANES / 8; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  return sum;
}

template <typename Math>
struct PointGrad {
  Math weight;
  Pack<Math, 2> location;
};

// Returns the gradients of a point, from the dot products of the output's gradient with the four pixels.
template <typename Math>
__device__ PointGrad<Math> grad_of(const Point<Math>& point, Pack<Math, 4> dots) {
  PointGrad<Math> grad = {};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    dots.at[corner] = point.has(corner) ? dots.at[corner] : 0;
    grad.weight += point.bilinear(corner) * dots.at[corner];
  }
  const Math a = point.right, b = point.lower;
  grad.location.at[0] = (1 - b) * (dots.at[1] - dots.at[0]) + b * (dots.at[3] - dots.at[2]);
  grad.location.at[1] = (1 - a) * (dots.at[2] - dots.at[0]) + a * (dots.at[3] - dots.at[1]);
  grad.location.at[0] *= point.weight_times_width, grad.location.at[1] *= point.weight_times_height;
  return grad;
}

// Returns the largest power of 2 with which sums up to the bound fit into 63 bits, or NaN if the bound is not finite.
__device__ inline double fixed_scale(double bound) {
  if (!(bound < static_cast<double>(INFINITY))) return NAN;
  int exponent;
  frexp(bound, &exponent);
  return ldexp(1.0, 62 - max(exponent, -960));
}

// Adds factor * grad to RUN neighbouring sums in global memory.
template <int RUN, typename Math>
__device__ void add(Math* sums, Math factor, const Math* grad, double) {
#if VECTOR_ATOMICS
  if constexpr (RUN == 4) {
    atomicAdd(reinterpret_cast<float4*>(sums),
              make_float4(factor * grad[0], factor * grad[1], factor * grad[2], factor * grad[3]));
  } else
#endif
    atomicAdd(sums, factor * *grad);
}

template <int RUN, typename Math>
__device__ void add(unsigned long long* sums, Math factor, const Math* grad, double scale) {
  const double term = static_cast<double>(factor) * static_cast<double>(*grad) * scale;
  atomicAdd(sums, static_cast<unsigned long long>(__double2ll_rn(term)));
}

// A lane's part of the output's gradient. `read` is for the channels that the lane reads from pixels, VEC neighbours among VEC *
// LANES. `added` is for the channels that it adds to pixels, runs of RUN neighbours. Neighbouring lanes have neighbouring runs, so
// that one addition by all lanes fills whole sectors of memory.
template <typename C, int RUN>
struct OutputGrad {
  typename C::Math read[C::kVec], added[C::kVec];

  static __device__ int added_channel(int lane, int i) { return i * C::kLanes + lane * RUN; }

  // Loads the part from the next channels, of which `num_left` exist.
  __device__ void load_from(const typename C::Value* first, int lane, int num_left) {
    const auto part = load<C::kVec>(first + (lane * C::kVec < num_left ? lane * C::kVec : 0));
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) read[i] = widen(part.at[i]);
#pragma unroll
    for (int i = 0; i < C::kVec; i += RUN) {
      const int channel = added_channel(lane, i);
      const auto part = load<RUN>(first + (channel < num_left ? channel : 0));
#pragma unroll
      for (int j = 0; j < RUN; ++j) added[i + j] = widen(part.at[j]);
    }
  }
};

// Sum: type of the sums of grad_value, Math or unsigned long long (fixed point). bound: see GradValue.
template <typename C, typename Sum>
__global__ void __launch_bounds__(C::kBackwardThreads, sizeof(Sum) == 4 ? C::kBackwardBlocks : C::kWideBackwardBlocks)
    backward_kernel(const typename C::Value* __restrict__ value, const typename C::Math* __restrict__ locations,
                    const typename C::Math* __restrict__ weights, const typename C::Value* __restrict__ grad_output,
                    Sum* __restrict__ grad_value, const double* __restrict__ bound,
                    typename C::Math* __restrict__ grad_locations, typename C::Math* __restrict__ grad_weights,
                    const __grid_constant__ Layout layout) {
  using Value = typename C::Value;
  using Math = typename C::Math;
  constexpr int run = VECTOR_ATOMICS && std::is_same_v<Sum, float> && C::kVec % 4 == 0 ? 4 : 1;
  constexpr int points_of_lane = (C::kTile + C::kLanes - 1) / C::kLanes;
  struct Shared {
    Corners<Math, C::kBackwardGroups, C::kTile> corners;
    Pack<Math, 4> dots[C::kBackwardGroups][C::kTile + 1];
  };
  __shared__ Shared shared;

  const int group = threadIdx.x / C::kLanes, lane = threadIdx.x % C::kLanes;
  const int channels = C::kChannels ? C::kChannels : layout.channels, num_points = layout.num_levels * layout.points;
  const int query = find_query<C::kLanes>(layout);
  if (!__any_sync(kWarp, query >= 0)) return;
  Math* own_dots = shared.dots[group][0].at + lane / (C::kLanes / 4);
  const double scale = std::is_same_v<Sum, Math> ? 1 : fixed_scale(*bound);

  for_each_head(layout, [&](int image, int head) {
    const int64_t slice = (static_cast<int64_t>(image) * layout.queries + max(query, 0)) * layout.heads + head;
    const int64_t origin = (static_cast<int64_t>(image) * layout.tokens * layout.heads + head) * channels;
    const Value* pixels = settle(value + origin + lane * C::kVec);
    Sum* grad_pixels = settle(grad_value + origin + lane * run);
    OutputGrad<C, run> grad;
    if constexpr (C::kChannels) grad.load_from(grad_output + slice * channels, lane, channels);

    for (int first = 0; first < num_points; first += C::kTile) {
      Point<Math> points[points_of_lane];
#pragma unroll
      for (int i = 0; i < points_of_lane; ++i) {
        const int slot = i * C::kLanes + lane;
        points[i] = {};
        if (query >= 0 && slot < C::kTile && first + slot < num_points) {
          points[i] = find_point(layout, locations + 2 * slice * num_points, weights + slice * num_points, first + slot);
        }
        if (slot < C::kTile) shared.corners.put(group, slot, points[i], layout.heads * channels / C::kVec);
      }
      __syncwarp();
      for (int i = 0; i < min(C::kTile, num_points - first); ++i) {
        const Pack<unsigned, 4> step = shared.corners.steps[group][i];
        const Pack<Math, 4> weight = shared.corners.weights[group][i];
        Math dot[4] = {};
        for (int channel = 0; channel < channels; channel += C::kLanes * C::kVec) {
          const int num_left = C::kChannels ? C::kLanes * C::kVec : channels - channel;
          if constexpr (!C::kChannels) grad.load_from(grad_output + slice * channels + channel, lane, num_left);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (lane * C::kVec >= num_left) continue;
            const auto pixel = load<C::kVec>(step_from<C::kVec>(pixels + channel, step.at[corner]));
#pragma unroll
            for (int j = 0; j < C::kVec; ++j) dot[corner] += grad.read[j] * widen(pixel.at[j]);
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (weight.at[corner] == 0) continue;
            Sum* sums = step_from<C::kVec>(grad_pixels + channel, step.at[corner]);
#pragma unroll
            for (int j = 0; j < C::kVec; j += run) {
              if (grad.added_channel(lane, j) >= num_left) continue;
              add<run>(sums + j * C::kLanes, weight.at[corner], grad.added + j, scale);
            }
          }
        }
        const Math sum = reduce_scatter<C::kLanes>(dot, lane);
        if (lane % (C::kLanes / 4) == 0) own_dots[4 * i] = sum;
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < points_of_lane; ++i) {
        const int slot = i * C::kLanes + lane;
        if (query < 0 || slot >= C::kTile || first + slot >= num_points) continue;
        const PointGrad<Math> point_grad = grad_of(points[i], shared.dots[group][slot]);
        const int64_t index = slice * num_points + first + slot;
        grad_weights[index] = point_grad.weight;
        *reinterpret_cast<Pack<Math, 2>*>(grad_locations + 2 * index) = point_grad.location;
      }
    }
  });
}

template <typename T>
__global__ void from_fixed_kernel(const unsigned long long* __restrict__ sums, const double* __restrict__ bound, int64_t count,
                                  T* __restrict__ values) {
  using Math = typename Config<T, 1, 1, 0>::Math;
  const double inverse = 1 / fixed_scale(*bound);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    narrow(static_cast<Math>(static_cast<int64_t>(sums[i]) * inverse), values[i]);
  }
}

}  // namespace ms_deform_attn
