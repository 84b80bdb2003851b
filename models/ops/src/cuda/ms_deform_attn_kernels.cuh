// CUDA kernels of multi-scale deformable attention (arXiv:2010.04159, Eq. 3).
//
// A group of lanes of one warp works on one head of one query; each lane holds a few channels, so that a pixel is read in
// one 16-byte load a lane. The lanes first share out the sampling points among themselves and leave, in shared memory, the
// four pixels of each and their weights; then all of them walk over these points, without branches. A block is one head of
// neighbouring queries, which sample the same pixels: in an encoder, where queries are pixels, a tile of one level.
//
// Letters: N pictures, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ms_deform_attn_kernels.h"

#ifndef VECTOR_ATOMICS
#define VECTOR_ATOMICS (__CUDA_ARCH__ >= 900)
#endif

namespace ms_deform_attn {

constexpr int kTile = 16;       // points in shared memory at a time
constexpr int kTileWidth = 8;   // queries of a block side by side, where queries are pixels
constexpr unsigned kWarp = ~0u;  // all 32 lanes

constexpr int at_most(int a, int b) { return a < b ? a : b; }

// N neighbours, moved at once if they fill no more than 16 bytes.
template <typename T, int N>
struct alignas(at_most(sizeof(T) * N, 16)) Pack {
  T at[N];
};

template <int N, typename T>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// How lanes share the channels. CHANNELS: channels of a head if the compiler is to know them, else 0.
template <typename T, int VEC, int LANES, int CHANNELS>
struct Config {
  using Value = T;
  using Math = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVec = VEC, kLanes = LANES, kChannels = CHANNELS;
  static constexpr int kForwardGroups = at_most(64, 512 / LANES), kBackwardGroups = at_most(32, 256 / LANES);  // a block
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// The address of a row `bytes` long: one 32-bit multiplication with a 64-bit sum.
template <typename T>
__device__ T* row_of(T* first, int row, int bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + static_cast<int64_t>(row) * bytes);
}

// The query of this thread's group, -1 beyond the last.
template <int LANES>
__device__ int find_query(const Sizes& sizes, bool tiled) {
  const int group = threadIdx.x / LANES, groups = blockDim.x / LANES, block = blockIdx.x;
  if (!tiled) {
    const int query = block * groups + group;
    return query < sizes.queries ? query : -1;
  }
  int index = 0;
  while (index + 1 < sizes.num_levels && block >= sizes.levels[index + 1].first_tile) ++index;
  const Level level = sizes.levels[index];
  const int tile = block - level.first_tile, tiles_across = (level.width + kTileWidth - 1) / kTileWidth;
  const int x = tile % tiles_across * kTileWidth + group % kTileWidth;
  const int y = tile / tiles_across * (groups / kTileWidth) + group / kTileWidth;
  return x < level.width && y < level.height ? level.start + y * level.width + x : -1;
}

// A sampling point between its four pixels: upper left, upper right, lower left, lower right.
template <typename Math>
struct Point {
  Level level;
  bool inside;  // touches a pixel
  int x, y;     // of the upper left pixel, from -1
  Math right, lower, weight;

  __device__ bool has(int corner) const {
    const int column = x + corner % 2, row = y + corner / 2;
    return inside && column >= 0 && column < level.width && row >= 0 && row < level.height;
  }

  // A pixel that is missing becomes its neighbour, which counts anyway: no other pixel, which may be NaN, is touched.
  __device__ int token(int corner) const {
    const int column = min(max(x + corner % 2, 0), level.width - 1), row = min(max(y + corner / 2, 0), level.height - 1);
    return inside ? level.start + row * level.width + column : 0;
  }

  __device__ Math bilinear(int corner) const {
    return (corner % 2 ? right : 1 - right) * (corner / 2 ? lower : 1 - lower);
  }
};

// Point `index` of the levels * points of a head; nowhere if not `wanted`.
template <typename Math>
__device__ Point<Math> find_point(const Sizes& sizes, const Math* locations, const Math* weights, int index, bool wanted) {
  Point<Math> point = {};
  if (!wanted) return point;
  // A division by the number of points. Exact: the quotient is at least 0.5 / kMaxPoints away from an integer.
  const int level_index = static_cast<int>((index + 0.5f) * (1.0f / sizes.points));
  point.level = sizes.levels[level_index];
  const Pack<Math, 2> location = load<2>(locations + 2 * index);
  const Math x = location.at[0] * point.level.width - Math(0.5), y = location.at[1] * point.level.height - Math(0.5);
  point.inside = x > -1 && y > -1 && x < point.level.width && y < point.level.height;
  if (!point.inside) return point;  // NaN and infinity too, which fit no integer
  const Math left = floor(x), upper = floor(y);
  point.x = static_cast<int>(left), point.y = static_cast<int>(upper);
  point.right = x - left, point.lower = y - upper;
  point.weight = weights[index];
  return point;
}

// Points of a block, in shared memory. One column more than needed: groups of a warp read from different banks.
template <typename Math, int GROUPS>
struct Corners {
  Pack<int, 4> tokens[GROUPS][kTile + 1];
  Pack<Math, 4> weights[GROUPS][kTile + 1];  // attention weight times bilinear weight, 0 for a missing pixel

  __device__ void put(int group, int slot, const Point<Math>& point) {
    Pack<int, 4> token;
    Pack<Math, 4> weight;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      token.at[corner] = point.token(corner);
      weight.at[corner] = point.has(corner) ? point.weight * point.bilinear(corner) : 0;
    }
    tokens[group][slot] = token;
    weights[group][slot] = weight;
  }
};

// Calls run(head, slice) for the heads of this block: head of the picture, and of all pictures.
template <typename Run>
__device__ void for_each_head(const Sizes& sizes, Run run) {
  for (int64_t picture = blockIdx.z; picture < sizes.batch; picture += gridDim.z) {
    for (int head = blockIdx.y; head < sizes.heads; head += gridDim.y) run(picture, head);
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kForwardGroups * C::kLanes)
    forward_kernel(const typename C::Value* __restrict__ value, const typename C::Math* __restrict__ locations,
                   const typename C::Math* __restrict__ weights, typename C::Value* __restrict__ output,
                   const __grid_constant__ Sizes sizes, bool tiled) {
  using Value = typename C::Value;
  using Math = typename C::Math;
  __shared__ Corners<Math, C::kForwardGroups> corners;

  const int group = threadIdx.x / C::kLanes, lane = threadIdx.x % C::kLanes;
  const int channels = C::kChannels ? C::kChannels : sizes.channels;
  const int row_bytes = sizes.heads * channels * sizeof(Value), num_points = sizes.num_levels * sizes.points;
  const int query = find_query<C::kLanes>(sizes, tiled);

  for_each_head(sizes, [&](int64_t picture, int head) {
    const int64_t slice = (picture * sizes.queries + max(query, 0)) * sizes.heads + head;
    for (int channel = lane * C::kVec; channel - lane * C::kVec < channels; channel += C::kLanes * C::kVec) {
      const bool active = C::kChannels || channel < channels;
      const Value* pixels = value + (picture * sizes.tokens * sizes.heads + head) * channels + (active ? channel : 0);
      Math sum[C::kVec] = {};
      for (int first = 0; first < num_points; first += kTile) {
        int count = 0;  // points that touch their level, of all lanes: only these are kept
        __syncwarp();
#pragma unroll
        for (int slot = lane; slot - lane < kTile; slot += C::kLanes) {
          const int index = first + slot;
          const bool wanted = query >= 0 && slot < kTile && index < num_points;
          const Point<Math> point = find_point(sizes, locations + 2 * slice * num_points, weights + slice * num_points, index,
                                               wanted);
          const unsigned found = __ballot_sync(kWarp, point.inside) >> (threadIdx.x % 32 - lane) & kWarp >> (32 - C::kLanes);
          if (point.inside) corners.put(group, count + __popc(found & ((1u << lane) - 1)), point);
          count += __popc(found);
        }
        __syncwarp();
        for (int i = 0; i < count; ++i) {
          const Pack<int, 4> token = corners.tokens[group][i];
          const Pack<Math, 4> weight = corners.weights[group][i];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const auto pixel = load<C::kVec>(row_of(pixels, token.at[corner], row_bytes));
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

// 2^k, as large as sums up to the bound allow in 62 bits; NaN where the bound is not finite.
__device__ inline double fixed_scale(double bound) {
  if (!(bound < static_cast<double>(INFINITY))) return NAN;
  int exponent;
  frexp(bound, &exponent);
  return ldexp(1.0, 62 - max(exponent, -900));
}

// Adds factor * grad to sums in global memory.
template <int N, typename Math>
__device__ void add(Math* sums, Math factor, const Math (&grad)[N], double) {
#if VECTOR_ATOMICS
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      atomicAdd(reinterpret_cast<float4*>(sums + j),
                make_float4(factor * grad[j], factor * grad[j + 1], factor * grad[j + 2], factor * grad[j + 3]));
    }
    return;
  }
#endif
#pragma unroll
  for (int j = 0; j < N; ++j) atomicAdd(sums + j, factor * grad[j]);
}

template <int N, typename Math>
__device__ void add(unsigned long long* sums, Math factor, const Math (&grad)[N], double scale) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const double term = static_cast<double>(factor) * static_cast<double>(grad[j]) * scale;
    atomicAdd(sums + j, static_cast<unsigned long long>(__double2ll_rn(term)));
  }
}

// Sum: what grad_value is summed in, Math or unsigned long long (fixed point). bound: see GradValue.
template <typename C, typename Sum>
__global__ void __launch_bounds__(C::kBackwardGroups * C::kLanes)
    backward_kernel(const typename C::Value* __restrict__ value, const typename C::Math* __restrict__ locations,
                    const typename C::Math* __restrict__ weights, const typename C::Value* __restrict__ grad_output,
                    Sum* __restrict__ grad_value, const double* __restrict__ bound,
                    typename C::Math* __restrict__ grad_locations, typename C::Math* __restrict__ grad_weights,
                    const __grid_constant__ Sizes sizes, bool tiled) {
  using Value = typename C::Value;
  using Math = typename C::Math;
  __shared__ Corners<Math, C::kBackwardGroups> corners;
  __shared__ Pack<Math, 4> dots[C::kBackwardGroups][kTile + 1];  // of the output's gradient with each pixel

  const int group = threadIdx.x / C::kLanes, lane = threadIdx.x % C::kLanes;
  const int channels = C::kChannels ? C::kChannels : sizes.channels;
  const int row_elements = sizes.heads * channels, num_points = sizes.num_levels * sizes.points;
  const int query = find_query<C::kLanes>(sizes, tiled);
  if (!__any_sync(kWarp, query >= 0)) return;
  const double scale = std::is_same_v<Sum, Math> ? 1 : fixed_scale(*bound);

  const auto load_grad = [&](int64_t slice, int channel, Math(&grad)[C::kVec]) {
    const auto packed = load<C::kVec>(grad_output + slice * channels + channel);
#pragma unroll
    for (int j = 0; j < C::kVec; ++j) grad[j] = widen(packed.at[j]);
  };

  for_each_head(sizes, [&](int64_t picture, int head) {
    const int64_t slice = (picture * sizes.queries + max(query, 0)) * sizes.heads + head, first_index = slice * num_points;
    const int64_t origin = (picture * sizes.tokens * sizes.heads + head) * channels;
    Math grad[C::kVec];
    if constexpr (C::kChannels) load_grad(slice, lane * C::kVec, grad);
    for (int first = 0; first < num_points; first += kTile) {
      Point<Math> points[(kTile + C::kLanes - 1) / C::kLanes];  // of this lane
      const auto for_each_point = [&](auto run) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(points) / sizeof(points[0])); ++i) {
          const int slot = i * C::kLanes + lane;
          if (slot < kTile) run(points[i], slot, query >= 0 && first + slot < num_points);
        }
      };
      for_each_point([&](Point<Math>& point, int slot, bool wanted) {
        point = find_point(sizes, locations + 2 * first_index, weights + first_index, first + slot, wanted);
        corners.put(group, slot, point);
      });
      __syncwarp();
      for (int i = 0; i < min(kTile, num_points - first); ++i) {
        const Pack<int, 4> token = corners.tokens[group][i];
        const Pack<Math, 4> weight = corners.weights[group][i];
        Math dot[4] = {};
        for (int channel = lane * C::kVec; channel < channels; channel += C::kLanes * C::kVec) {
          if constexpr (!C::kChannels) load_grad(slice, channel, grad);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const auto pixel = load<C::kVec>(row_of(value + origin + channel, token.at[corner], row_elements * sizeof(Value)));
#pragma unroll
            for (int j = 0; j < C::kVec; ++j) dot[corner] += grad[j] * widen(pixel.at[j]);
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            Sum* sums = row_of(grad_value + origin + channel, token.at[corner], row_elements * sizeof(Sum));
            if (weight.at[corner] != 0) add(sums, weight.at[corner], grad, scale);
          }
        }
        const Math sum = reduce_scatter<C::kLanes>(dot, lane);
        if (lane % (C::kLanes / 4) == 0) dots[group][i].at[lane / (C::kLanes / 4)] = sum;
      }
      __syncwarp();
      for_each_point([&](Point<Math>& point, int slot, bool wanted) {
        if (!wanted) return;
        Pack<Math, 4> dot = dots[group][slot];
        Math grad_weight = 0;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          dot.at[corner] = point.has(corner) ? dot.at[corner] : 0;
          grad_weight += point.bilinear(corner) * dot.at[corner];
        }
        const Math a = point.right, b = point.lower;
        const Math along_x = (1 - b) * (dot.at[1] - dot.at[0]) + b * (dot.at[3] - dot.at[2]);
        const Math along_y = (1 - a) * (dot.at[2] - dot.at[0]) + a * (dot.at[3] - dot.at[1]);
        const int64_t index = first_index + first + slot;
        grad_weights[index] = grad_weight;
        *reinterpret_cast<Pack<Math, 2>*>(grad_locations + 2 * index) = {point.level.width * point.weight * along_x,
                                                                         point.level.height * point.weight * along_y};
      });
      __syncwarp();
    }
  });
}

template <typename T>
__global__ void from_fixed_kernel(const unsigned long long* __restrict__ sums, const double* __restrict__ bound, int64_t count,
                                  T* __restrict__ values) {
  const double inverse = 1 / fixed_scale(*bound);
  using Math = typename Config<T, 1, 1, 0>::Math;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    narrow(static_cast<Math>(static_cast<int64_t>(sums[i]) * inverse), values[i]);
  }
}

}  // namespace ms_deform_attn
