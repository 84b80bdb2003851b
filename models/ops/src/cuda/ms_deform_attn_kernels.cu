// Launchers: they choose the kernel and its grid.

#include "ms_deform_attn_kernels.cuh"

#include <algorithm>

namespace ms_deform_attn {
namespace {

// Runs the kernel that fits the type and the channels: one for 32 channels, one that moves 16 bytes, one for all others.
template <typename T, Type TYPE, typename Run>
cudaError_t with_config(int channels, Run run) {
  constexpr int vec = vec_of(TYPE, 32);
  if (channels == 32) return run(Config<T, vec, 32 / vec, 32>());
  if (vec_of(TYPE, channels) == vec) return run(Config<T, vec, 64 / vec, 0>());
  return run(Config<T, 1, 32, 0>());
}

template <typename Run>
cudaError_t with_config(Type type, int channels, Run run) {
  switch (type) {
    case Type::kFloat: return with_config<float, Type::kFloat>(channels, run);
    case Type::kDouble: return with_config<double, Type::kDouble>(channels, run);
    case Type::kHalf: return with_config<__half, Type::kHalf>(channels, run);
    case Type::kBFloat16: return with_config<__nv_bfloat16, Type::kBFloat16>(channels, run);
  }
  return cudaErrorInvalidValue;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(block), config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

struct Plan {
  Layout layout;
  dim3 grid;
  unsigned block;
};

// If queries are pixels (an encoder), blocks have `max_groups` neighbouring queries. Otherwise they have 128 threads: such calls
// are small, and many small blocks reach all multiprocessors.
Plan make_plan(const Sizes& sizes, int lanes, int max_groups) {
  const bool tiled = sizes.queries == sizes.tokens;
  const int groups = tiled ? max_groups : std::min(max_groups, 128 / lanes), tile_height = max_groups / kTileWidth;
  Layout layout = {sizes.batch,      sizes.tokens, sizes.heads,         sizes.channels, sizes.queries,
                   sizes.num_levels, sizes.points, 1.0f / sizes.points, tiled,          {}};
  int tokens = 0, tiles = 0;
  for (int i = 0; i < sizes.num_levels; ++i) {
    const int height = sizes.heights[i], width = sizes.widths[i];
    layout.levels[i] = {height, width, tokens, tiles};
    tokens += height * width;
    tiles += ((height - 1) / tile_height + 1) * ((width - 1) / kTileWidth + 1);
  }
  const unsigned blocks = tiled ? tiles : (sizes.queries - 1) / groups + 1;
  constexpr int most = 65535;  // the kernels loop over what is beyond
  const dim3 grid(blocks, std::min(sizes.heads, most), std::min(sizes.batch, most));
  return {layout, grid, static_cast<unsigned>(groups * lanes)};
}

}  // namespace

cudaError_t launch_forward(Type type, const Sizes& sizes, const Inputs& inputs, void* output, cudaStream_t stream) {
  return with_config(type, sizes.channels, [&](auto config) {
    using C = decltype(config);
    using Value = typename C::Value;
    using Math = typename C::Math;
    const Plan plan = make_plan(sizes, C::kLanes, C::kForwardGroups);
    return launch(forward_kernel<C>, plan.grid, plan.block, stream, static_cast<const Value*>(inputs.value),
                  static_cast<const Math*>(inputs.locations), static_cast<const Math*>(inputs.weights),
                  static_cast<Value*>(output), plan.layout);
  });
}

cudaError_t launch_backward(Type type, const Sizes& sizes, const Inputs& inputs, const void* grad_output,
                            const GradValue& grad_value, void* grad_locations, void* grad_weights, cudaStream_t stream) {
  return with_config(type, sizes.channels, [&](auto config) {
    using C = decltype(config);
    using Value = typename C::Value;
    using Math = typename C::Math;
    const Plan plan = make_plan(sizes, C::kLanes, C::kBackwardGroups);
    const auto run = [&](auto* sums) {
      return launch(backward_kernel<C, std::remove_pointer_t<decltype(sums)>>, plan.grid, plan.block, stream,
                    static_cast<const Value*>(inputs.value), static_cast<const Math*>(inputs.locations),
                    static_cast<const Math*>(inputs.weights), static_cast<const Value*>(grad_output), sums, grad_value.bound,
                    static_cast<Math*>(grad_locations), static_cast<Math*>(grad_weights), plan.layout);
    };
    if (grad_value.fixed_sums) return run(reinterpret_cast<unsigned long long*>(grad_value.fixed_sums));
    return run(static_cast<Math*>(grad_value.sums));
  });
}

cudaError_t launch_from_fixed(Type type, const GradValue& grad_value, int64_t count, void* values, cudaStream_t stream) {
  constexpr unsigned threads = 256;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count - 1) / threads + 1, 1 << 20));
  return with_config(type, 1, [&](auto config) {
    using Value = typename decltype(config)::Value;
    return launch(from_fixed_kernel<Value>, dim3(blocks), threads, stream,
                  reinterpret_cast<const unsigned long long*>(grad_value.fixed_sums), grad_value.bound, count,
                  static_cast<Value*>(values));
  });
}

}  // namespace ms_deform_attn
