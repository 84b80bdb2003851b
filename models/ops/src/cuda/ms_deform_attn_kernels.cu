// Which kernel runs, on which grid.

#include "ms_deform_attn_kernels.cuh"

#include <algorithm>

namespace ms_deform_attn {
namespace {

// Runs the kernel that fits the type and the channels: one for 32 channels, one that loads 16 bytes, one for all others.
template <typename T, typename Run>
cudaError_t with_config(int channels, Run run) {
  constexpr int vec = 16 / sizeof(T);
  if (channels == 32) return run(Config<T, vec, 32 / vec, 32>());
  if (channels % vec == 0) return run(Config<T, vec, 64 / vec, 0>());
  return run(Config<T, 1, 32, 0>());
}

template <typename Run>
cudaError_t with_config(Type type, int channels, Run run) {
  switch (type) {
    case Type::kFloat: return with_config<float>(channels, run);
    case Type::kDouble: return with_config<double>(channels, run);
    case Type::kHalf: return with_config<__half>(channels, run);
    case Type::kBFloat16: return with_config<__nv_bfloat16>(channels, run);
  }
  return cudaErrorInvalidValue;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(block), config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

struct Layout {
  Sizes sizes;
  bool tiled;
  int groups;  // of a block
  dim3 grid;
};

// Blocks of `max_groups` queries that lie together if queries are pixels (an encoder), else of 128 threads: such calls are
// small, and many small blocks reach all multiprocessors.
Layout arrange(Sizes sizes, int lanes, int max_groups) {
  const bool tiled = sizes.queries == sizes.tokens;
  const int groups = tiled ? max_groups : 128 / lanes, tile_height = groups / kTileWidth;
  int tokens = 0, tiles = 0;
  for (int i = 0; i < sizes.num_levels; ++i) {
    Level& level = sizes.levels[i];
    level.start = tokens, level.first_tile = tiles;
    tokens += level.height * level.width;
    tiles += ((level.height - 1) / tile_height + 1) * ((level.width - 1) / kTileWidth + 1);
  }
  const unsigned blocks = tiled ? tiles : (sizes.queries - 1) / groups + 1;
  const auto limited = [](int64_t count) { return static_cast<unsigned>(std::min<int64_t>(count, 65535)); };
  return {sizes, tiled, groups, dim3(blocks, limited(sizes.heads), limited(sizes.batch))};
}

}  // namespace

cudaError_t launch_forward(Type type, const Sizes& sizes, const Inputs& inputs, void* output, cudaStream_t stream) {
  return with_config(type, sizes.channels, [&](auto config) {
    using C = decltype(config);
    const Layout layout = arrange(sizes, C::kLanes, C::kForwardGroups);
    return launch(forward_kernel<C>, layout.grid, layout.groups * C::kLanes, stream,
                  static_cast<const typename C::Value*>(inputs.value), static_cast<const typename C::Math*>(inputs.locations),
                  static_cast<const typename C::Math*>(inputs.weights), static_cast<typename C::Value*>(output), layout.sizes,
                  layout.tiled);
  });
}

cudaError_t launch_backward(Type type, const Sizes& sizes, const Inputs& inputs, const void* grad_output,
                            const GradValue& grad_value, void* grad_locations, void* grad_weights, cudaStream_t stream) {
  return with_config(type, sizes.channels, [&](auto config) {
    using C = decltype(config);
    using Math = typename C::Math;
    const Layout layout = arrange(sizes, C::kLanes, C::kBackwardGroups);
    const auto run = [&](auto* sums) {
      return launch(backward_kernel<C, std::remove_pointer_t<decltype(sums)>>, layout.grid, layout.groups * C::kLanes, stream,
                    static_cast<const typename C::Value*>(inputs.value), static_cast<const Math*>(inputs.locations),
                    static_cast<const Math*>(inputs.weights), static_cast<const typename C::Value*>(grad_output), sums,
                    grad_value.bound, static_cast<Math*>(grad_locations), static_cast<Math*>(grad_weights), layout.sizes,
                    layout.tiled);
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
