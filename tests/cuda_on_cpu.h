// Enough of CUDA to run kernels on a CPU, for tests/test_cuda_kernels.py.
//
// Threads of a warp are fibers. Each runs alone until it meets a warp-wide operation, and goes on when all 32 have come to
// the same one: a kernel that lacks a barrier reads what another thread has not written yet, and one whose threads part ways
// at such an operation is stopped. Warps run one after the other, so there is no barrier of a block.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline long long __double2ll_rn(double x) { return llrint(x); }

namespace cuda_on_cpu {

constexpr int kLanes = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::_Exit(3);
}

enum class Operation { kNone, kSync, kBallot, kShuffle };

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool finished;
  Operation operation;  // that it waits at
  int detail;
  uint64_t given;  // to the others
};

inline Lane lanes[kLanes];
inline uint64_t taken[kLanes];  // what the lanes have given to the operation at which they met
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> kernel;
inline bool reversed;  // blocks, warps and lanes run in the opposite order

inline void run_lane() {
  kernel();
  lanes[current].finished = true;
}

inline void meet(unsigned mask, Operation operation, int detail, uint64_t given) {
  if (mask != ~0u) fail("a warp-wide operation of a part of the warp");
  Lane& lane = lanes[current];
  lane.operation = operation, lane.detail = detail, lane.given = given;
  swapcontext(&lane.context, &scheduler);
}

// Each lane up to its next operation, or to its end.
inline void run_lanes(unsigned first_thread) {
  for (int i = 0; i < kLanes; ++i) {
    current = reversed ? kLanes - 1 - i : i;
    threadIdx.x = first_thread + current;
    lanes[current].operation = Operation::kNone;
    swapcontext(&scheduler, &lanes[current].context);
  }
}

inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    lane.finished = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data(), lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, run_lane, 0);
  }
  do {
    run_lanes(first_thread);
    for (int i = 0; i < kLanes; ++i) {
      const Lane &lane = lanes[i], &first = lanes[0];
      if (lane.finished != first.finished) fail("some lanes of a warp end while others wait");
      if (lane.operation != first.operation || lane.detail != first.detail) fail("lanes wait at different operations");
      taken[i] = lane.given;
    }
  } while (!lanes[0].finished);
}

inline void run_grid(dim3 grid, dim3 block, std::function<void()> run) {
  if (block.x % kLanes || block.x > 1024 || grid.y > 65535 || grid.z > 65535) fail("impossible grid");
  kernel = std::move(run), gridDim = grid, blockDim = block;
  const uint64_t num_blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < num_blocks; ++i) {
    const uint64_t number = reversed ? num_blocks - 1 - i : i;
    blockIdx = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    for (unsigned first = 0; first < block.x; first += kLanes) run_warp(reversed ? block.x - kLanes - first : first);
  }
}

}  // namespace cuda_on_cpu

inline void __syncwarp() { cuda_on_cpu::meet(~0u, cuda_on_cpu::Operation::kSync, 0, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  cuda_on_cpu::meet(mask, cuda_on_cpu::Operation::kBallot, 0, predicate != 0);
  unsigned result = 0;
  for (int i = 0; i < cuda_on_cpu::kLanes; ++i) result |= static_cast<unsigned>(cuda_on_cpu::taken[i]) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
T __shfl_xor_sync(unsigned mask, T number, int step) {
  uint64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(T));
  cuda_on_cpu::meet(mask, cuda_on_cpu::Operation::kShuffle, step, bits);
  std::memcpy(&number, &cuda_on_cpu::taken[cuda_on_cpu::current ^ step], sizeof(T));
  return number;
}

template <typename T>
void atomicAdd(T* sum, T number) {
  *sum += number;
}
inline void atomicAdd(float4* sum, float4 number) {
  *sum = {sum->x + number.x, sum->y + number.y, sum->z + number.z, sum->w + number.w};
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*run)(Parameters...), Arguments... arguments) {
  cuda_on_cpu::run_grid(config->gridDim, config->blockDim, [=] { run(arguments...); });
  return cudaSuccess;
}
