// Multi-scale deformable attention on the CPU (arXiv:2010.04159, Eq. 3), float and double.
//
// Forward runs in parallel over (image, query), backward over (image, head) or (image, head, level): each task owns its part
// of every gradient, so nothing is atomic and the result has the same bits for any number of threads. Loops over channels are
// vectorised by the compiler, once for each instruction set; the loader of the machine picks the widest.
//
// Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#ifdef _MSC_VER
#define INLINE inline __forceinline
#define RESTRICT __restrict
#else
#define INLINE inline __attribute__((always_inline))
#define RESTRICT __restrict__
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL_4 _Pragma("GCC unroll 4")
#define INDEPENDENT _Pragma("GCC ivdep")
#define PREFETCH(address, for_writing) __builtin_prefetch(address, for_writing)
#else
#define UNROLL_4
#define INDEPENDENT
#define PREFETCH(address, for_writing)
#endif

namespace {

constexpr int64_t kQueriesAhead = 3;  // distance in queries of the prefetches

struct Level {
  int64_t height, width, start;
};

struct Sizes {
  int64_t batch, tokens, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t num_levels() const { return static_cast<int64_t>(levels.size()); }
};

// The four pixels around a point. A pixel outside the level has weight 0 and the index of one inside, so that it can be read.
template <typename T>
struct Corners {
  int64_t token[4];  // upper left, upper right, lower left, lower right
  T weight[4], inside[4];
  T right, lower;  // distance from the upper left pixel
};

// False where the point touches no pixel of the level; NaN and infinity fail the comparisons.
template <typename T>
INLINE bool locate(const T* RESTRICT location, const Level& level, Corners<T>& corners) {
  const T x = location[0] * level.width - T(0.5), y = location[1] * level.height - T(0.5);
  if (!(x > -1 && y > -1 && x < level.width && y < level.height)) return false;
  const T x_floor = std::floor(x), y_floor = std::floor(y);
  const int64_t x0 = static_cast<int64_t>(x_floor), y0 = static_cast<int64_t>(y_floor);
  const T a = x - x_floor, b = y - y_floor;
  const T in_left = x0 >= 0, in_right = x0 + 1 < level.width, in_upper = y0 >= 0, in_lower = y0 + 1 < level.height;
  const int64_t column0 = std::max<int64_t>(x0, 0), column1 = std::min(x0 + 1, level.width - 1);
  const int64_t row0 = level.start + std::max<int64_t>(y0, 0) * level.width;
  const int64_t row1 = level.start + std::min(y0 + 1, level.height - 1) * level.width;
  corners.token[0] = row0 + column0, corners.token[1] = row0 + column1;
  corners.token[2] = row1 + column0, corners.token[3] = row1 + column1;
  corners.inside[0] = in_upper * in_left, corners.inside[1] = in_upper * in_right;
  corners.inside[2] = in_lower * in_left, corners.inside[3] = in_lower * in_right;
  corners.weight[0] = (1 - b) * (1 - a) * corners.inside[0], corners.weight[1] = (1 - b) * a * corners.inside[1];
  corners.weight[2] = b * (1 - a) * corners.inside[2], corners.weight[3] = b * a * corners.inside[3];
  corners.right = a, corners.lower = b;
  return true;
}

// D: channels of a head if they are known at compile time, else 0.
template <typename T, int D>
INLINE void forward_rows(const Sizes& sizes, const T* value, const T* locations, const T* weights, T* output, int64_t begin,
                         int64_t end) {
  const int64_t channels = D ? D : sizes.channels, stride = sizes.heads * channels;
  const int64_t points_a_head = sizes.num_levels() * sizes.points;
  for (int64_t row = begin; row < end; ++row) {
    const T* image = value + row / sizes.queries * sizes.tokens * stride;
    for (int64_t head = 0; head < sizes.heads; ++head) {
      const T* location = locations + (row * sizes.heads + head) * points_a_head * 2;
      const T* weight = weights + (row * sizes.heads + head) * points_a_head;
      const T* slice = image + head * channels;
      T* RESTRICT out = output + row * stride + head * channels;
      T registers[D ? D : 1] = {};
      if constexpr (D == 0) std::memset(out, 0, channels * sizeof(T));
      for (const Level& level : sizes.levels) {
        for (int64_t point = 0; point < sizes.points; ++point, location += 2, ++weight) {
          Corners<T> corners;
          if (!locate(location, level, corners)) continue;
          const T *v0 = slice + corners.token[0] * stride, *v1 = slice + corners.token[1] * stride;
          const T *v2 = slice + corners.token[2] * stride, *v3 = slice + corners.token[3] * stride;
          const T w0 = *weight * corners.weight[0], w1 = *weight * corners.weight[1];
          const T w2 = *weight * corners.weight[2], w3 = *weight * corners.weight[3];
          if constexpr (D > 0) {
            for (int c = 0; c < D; ++c) registers[c] += w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c];
          } else {
            for (int64_t c = 0; c < channels; ++c) out[c] += w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c];
          }
        }
      }
      if constexpr (D > 0) std::memcpy(out, registers, sizeof(registers));
    }
  }
}

template <typename T>
struct Backward {
  const T *grad_output, *value, *locations, *weights;
  T *grad_value, *grad_locations, *grad_weights;
};

// The work of one task: a head of an image, levels first to last - 1.
struct Part {
  int64_t image, head, first, last;
};

// Prefetches the data of a query, which is far from that of the query before: the hardware's prefetcher does not find it.
template <typename T>
INLINE void prefetch_query(const Sizes& sizes, const Backward<T>& data, int64_t index_of_head) {
  const int64_t first_point = index_of_head * sizes.num_levels() * sizes.points;
  PREFETCH(data.locations + 2 * first_point, 0);
  PREFETCH(data.locations + 2 * first_point + 64 / sizeof(T), 0);
  PREFETCH(data.weights + first_point, 0);
  PREFETCH(data.grad_output + index_of_head * sizes.channels, 0);
  PREFETCH(data.grad_output + index_of_head * sizes.channels + 64 / sizeof(T), 0);
  PREFETCH(data.grad_locations + 2 * first_point, 1);
  PREFETCH(data.grad_locations + 2 * first_point + 64 / sizeof(T), 1);
  PREFETCH(data.grad_weights + first_point, 1);
}

// Computes the gradients of one part. Rows of grad_value are summed in `scratch`, where they are contiguous, and written once: in
// the tensor, the rows of one head would share an eighth of the cache. Rows of `value` are copied there too if they are read often.
template <typename T, int D>
INLINE void backward_part(const Sizes& sizes, const Backward<T>& data, const Part& part, std::vector<T>& scratch) {
  const int64_t channels = D ? D : sizes.channels, stride = sizes.heads * channels;
  const int64_t first_token = sizes.levels[part.first].start;
  const Level& last_level = sizes.levels[part.last - 1];
  const int64_t tokens = last_level.start + last_level.height * last_level.width - first_token;
  const int64_t offset = (part.image * sizes.tokens + first_token) * stride + part.head * channels;
  const bool copy = sizes.queries * sizes.points * (part.last - part.first) > tokens;
  scratch.resize(tokens * channels * (copy ? 2 : 1));
  T* RESTRICT grad_rows = scratch.data();
  std::memset(grad_rows, 0, tokens * channels * sizeof(T));
  const T* RESTRICT rows = data.value + offset;
  const int64_t row_stride = copy ? channels : stride;
  if (copy) {
    T* RESTRICT copied = grad_rows + tokens * channels;
    for (int64_t i = 0; i < tokens; ++i) std::memcpy(copied + i * channels, rows + i * stride, channels * sizeof(T));
    rows = copied;
  }
  for (int64_t query = 0; query < sizes.queries; ++query) {
    const int64_t index_of_head = (part.image * sizes.queries + query) * sizes.heads + part.head;
    const T* RESTRICT grad = data.grad_output + index_of_head * channels;
    prefetch_query(sizes, data, index_of_head + kQueriesAhead * sizes.heads);
    for (int64_t l = part.first; l < part.last; ++l) {
      const Level level{sizes.levels[l].height, sizes.levels[l].width, sizes.levels[l].start - first_token};
      for (int64_t point = 0; point < sizes.points; ++point) {
        const int64_t index = (index_of_head * sizes.num_levels() + l) * sizes.points + point;
        Corners<T> corners;
        if (!locate(data.locations + 2 * index, level, corners)) {
          data.grad_weights[index] = data.grad_locations[2 * index] = data.grad_locations[2 * index + 1] = 0;
          continue;
        }
        const T a = corners.right, b = corners.lower, weight = data.weights[index];
        T dot[4];  // dot products of the output's gradient with each pixel
        UNROLL_4 for (int k = 0; k < 4; ++k) {
          const T* v = rows + corners.token[k] * row_stride;
          T sum = 0;
          for (int64_t c = 0; c < channels; ++c) sum += grad[c] * v[c];
          dot[k] = sum * corners.inside[k];
        }
        UNROLL_4 for (int k = 0; k < 4; ++k) {
          T* grad_v = grad_rows + corners.token[k] * channels;
          const T factor = weight * corners.weight[k];
          INDEPENDENT for (int64_t c = 0; c < channels; ++c) grad_v[c] += factor * grad[c];
        }
        data.grad_weights[index] = (1 - b) * ((1 - a) * dot[0] + a * dot[1]) + b * ((1 - a) * dot[2] + a * dot[3]);
        data.grad_locations[2 * index] = level.width * weight * ((1 - b) * (dot[1] - dot[0]) + b * (dot[3] - dot[2]));
        data.grad_locations[2 * index + 1] = level.height * weight * ((1 - a) * (dot[2] - dot[0]) + a * (dot[3] - dot[1]));
      }
    }
  }
  T* grad_value = data.grad_value + offset;
  for (int64_t i = 0; i < tokens; ++i) {
    std::memcpy(grad_value + i * stride, grad_rows + i * channels, channels * sizeof(T));
  }
}

// A clone for each instruction set can be made of plain functions only, into which everything above is inlined.
#define DEFINE_TASKS(T, NAME)                                                                                                    \
  CLONES void forward_task_##NAME(const Sizes& sizes, const T* value, const T* locations, const T* weights, T* output,           \
                                  int64_t begin, int64_t end) {                                                                  \
    switch (sizes.channels) {                                                                                                    \
      case 16: return forward_rows<T, 16>(sizes, value, locations, weights, output, begin, end);                                 \
      case 32: return forward_rows<T, 32>(sizes, value, locations, weights, output, begin, end);                                 \
      case 64: return forward_rows<T, 64>(sizes, value, locations, weights, output, begin, end);                                 \
      default: return forward_rows<T, 0>(sizes, value, locations, weights, output, begin, end);                                  \
    }                                                                                                                            \
  }                                                                                                                              \
  CLONES void backward_task_##NAME(const Sizes& sizes, const Backward<T>& data, const Part& part, std::vector<T>& scratch) {     \
    switch (sizes.channels) {                                                                                                    \
      case 16: return backward_part<T, 16>(sizes, data, part, scratch);                                                          \
      case 32: return backward_part<T, 32>(sizes, data, part, scratch);                                                          \
      case 64: return backward_part<T, 64>(sizes, data, part, scratch);                                                          \
      default: return backward_part<T, 0>(sizes, data, part, scratch);                                                           \
    }                                                                                                                            \
  }
DEFINE_TASKS(float, float)
DEFINE_TASKS(double, double)

template <typename T>
void run_forward(const Sizes& sizes, const T* value, const T* locations, const T* weights, T* output) {
  at::parallel_for(0, sizes.batch * sizes.queries, 16, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, float>) {
      forward_task_float(sizes, value, locations, weights, output, begin, end);
    } else {
      forward_task_double(sizes, value, locations, weights, output, begin, end);
    }
  });
}

template <typename T>
void run_backward(const Sizes& sizes, const Backward<T>& data) {
  const int64_t slices = sizes.batch * sizes.heads;
  // One task per level reads the output's gradient once for each level, which pays off if there are many threads.
  const int64_t parts = slices >= 2 * at::get_num_threads() ? 1 : sizes.num_levels();
  const int64_t levels_a_part = sizes.num_levels() / parts;
  at::parallel_for(0, slices * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / parts, first = task % parts * levels_a_part;
      const Part part{slice / sizes.heads, slice % sizes.heads, first, first + levels_a_part};
      if constexpr (std::is_same_v<T, float>) {
        backward_task_float(sizes, data, part, scratch);
      } else {
        backward_task_double(sizes, data, part, scratch);
      }
    }
  });
}

// A fresh tensor in huge pages where the system gives them: large ones cost more in page faults than in writing.
at::Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(shape, options);
#ifdef __linux__
  constexpr uintptr_t huge = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()), end = begin + tensor.nbytes();
  const uintptr_t aligned = (begin + huge - 1) / huge * huge;
  if (aligned < end) madvise(reinterpret_cast<void*>(aligned), end - aligned, MADV_HUGEPAGE);  // advice: it may fail
#endif
  return tensor;
}

Sizes check_sizes(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights) {
  TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be [N, S, M, D], not ", value.sizes());
  TORCH_CHECK(locations.dim() == 6 && locations.size(5) == 2, "ms_deform_attn: sampling_locations must be [N, Q, M, L, P, 2], not ",
              locations.sizes());
  const int64_t num_levels = locations.size(3);
  Sizes sizes{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4), {}};
  TORCH_CHECK(locations.size(0) == sizes.batch && locations.size(2) == sizes.heads, "ms_deform_attn: value ", value.sizes(),
              " and sampling_locations ", locations.sizes(), " differ in images or heads");
  TORCH_CHECK(weights.sizes() == locations.sizes().slice(0, 5), "ms_deform_attn: attention_weights must be ",
              locations.sizes().slice(0, 5), ", not ", weights.sizes());
  TORCH_CHECK(static_cast<int64_t>(shapes.size()) == 2 * num_levels, "ms_deform_attn: sampling_locations have ", num_levels,
              " levels, spatial_shapes ", shapes, " must list a height and a width for each");
  int64_t start = 0;
  for (int64_t l = 0; l < num_levels; ++l) {
    TORCH_CHECK(shapes[2 * l] > 0 && shapes[2 * l + 1] > 0, "ms_deform_attn: level ", l, " is empty: ", shapes);
    sizes.levels.push_back({shapes[2 * l], shapes[2 * l + 1], start});
    start += shapes[2 * l] * shapes[2 * l + 1];
  }
  TORCH_CHECK(start == sizes.tokens, "ms_deform_attn: the levels ", shapes, " have ", start, " tokens, value has ", sizes.tokens);
  return sizes;
}

// 16-bit values are computed in float.
at::Tensor full_precision(const at::Tensor& tensor, at::ScalarType dtype) { return tensor.to(dtype).contiguous(); }

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, shapes, locations, weights);
  const at::ScalarType dtype = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor v = full_precision(value, dtype), l = full_precision(locations, dtype), w = full_precision(weights, dtype);
  at::Tensor output = fresh({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, v.options());
  if (dtype == at::kDouble) {
    run_forward(sizes, v.data_ptr<double>(), l.data_ptr<double>(), w.data_ptr<double>(), output.data_ptr<double>());
  } else {
    run_forward(sizes, v.data_ptr<float>(), l.data_ptr<float>(), w.data_ptr<float>(), output.data_ptr<float>());
  }
  return output.to(value.scalar_type());
}

template <typename T>
void backward_into(const Sizes& sizes, const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& grads) {
  run_backward<T>(sizes, {inputs[0].data_ptr<T>(), inputs[1].data_ptr<T>(), inputs[2].data_ptr<T>(), inputs[3].data_ptr<T>(),
                          grads[0].data_ptr<T>(), grads[1].data_ptr<T>(), grads[2].data_ptr<T>()});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, shapes, locations, weights);
  TORCH_CHECK(grad_output.numel() == sizes.batch * sizes.queries * sizes.heads * sizes.channels,
              "ms_deform_attn: the gradient ", grad_output.sizes(), " does not fit value ", value.sizes());
  const at::ScalarType dtype = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<at::Tensor> inputs, grads;
  for (const at::Tensor& tensor : {grad_output, value, locations, weights}) inputs.push_back(full_precision(tensor, dtype));
  for (int i = 1; i < 4; ++i) grads.push_back(fresh(inputs[i].sizes(), inputs[i].options()));
  dtype == at::kDouble ? backward_into<double>(sizes, inputs, grads) : backward_into<float>(sizes, inputs, grads);
  return {grads[0].to(value.scalar_type()), grads[1].to(locations.scalar_type()), grads[2].to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(detr, CPU, library) {
  library.impl("ms_deform_attn", &forward);
  library.impl("ms_deform_attn_backward", &backward);
}
