// Attribution of every intermediate neuron, summed over the knowledge positions of a micro-batch.
#pragma once

#include "common.h"

#include <ATen/ops/empty.h>

namespace trelm {

// sums[j] += w_p * a[pos_p, j] * (-g[pos_p, j]) (signed) or w_p * |g[pos_p, j]| (absolute), for the
// columns [begin, end). Each column's sum runs over p in order, whatever the split into threads.
template <typename scalar_t, bool absolute>
void add_scores(
    const scalar_t* activation,
    int64_t activation_stride,
    const scalar_t* gradient,
    int64_t gradient_stride,
    const int64_t* positions,
    const float* weights,
    int64_t num_positions,
    int64_t begin,
    int64_t end,
    accumulate_t<scalar_t>* sums) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  const int64_t width = end - begin;
  const int64_t vector_end = width - width % Vec::size();
  for (int64_t p = 0; p < num_positions; ++p) {
    const scalar_t* g = gradient + positions[p] * gradient_stride + begin;
    const acc_t weight = static_cast<acc_t>(weights[p]);
    if constexpr (absolute) {
      for (int64_t j = 0; j < vector_end; j += Vec::size()) {
        at::vec::fmadd(Vec(weight), load_wide(g + j).abs(), Vec::loadu(sums + j)).store(sums + j);
      }
      for (int64_t j = vector_end; j < width; ++j) {
        sums[j] = std::fma(weight, std::abs(static_cast<acc_t>(g[j])), sums[j]);
      }
    } else {
      const scalar_t* a = activation + positions[p] * activation_stride + begin;
      for (int64_t j = 0; j < vector_end; j += Vec::size()) {
        // The product is rounded before it is weighed, as in the reference: terms that overflow
        // in both directions add up to NaN, which is never selected, in whatever order they come.
        at::vec::fmadd(Vec(-weight), load_wide(a + j) * load_wide(g + j), Vec::loadu(sums + j))
            .store(sums + j);
      }
      for (int64_t j = vector_end; j < width; ++j) {
        const acc_t product = static_cast<acc_t>(a[j]) * static_cast<acc_t>(g[j]);
        sums[j] = std::fma(-weight, product, sums[j]);
      }
    }
  }
}

inline Tensor neuron_scores(
    const Tensor& activation,
    const Tensor& gradient,
    const Tensor& positions,
    const Tensor& weights,
    bool absolute) {
  TORCH_CHECK(
      activation.dim() == 2 && activation.sizes() == gradient.sizes(),
      "neuron_scores: activation and gradient must be of one shape [N, f], got ",
      activation.sizes(), " and ", gradient.sizes());
  TORCH_CHECK(
      activation.scalar_type() == gradient.scalar_type(),
      "neuron_scores: activation and gradient must be of one dtype");
  TORCH_CHECK(
      positions.scalar_type() == at::kLong && positions.dim() == 1 && weights.dim() == 1 &&
          positions.size(0) == weights.size(0),
      "neuron_scores: positions must be int64 [P] and weights [P]");
  const int64_t rows = activation.size(0);
  const int64_t width = activation.size(1);
  const Tensor a = activation.stride(1) == 1 ? activation : activation.contiguous();
  const Tensor g = gradient.stride(1) == 1 ? gradient : gradient.contiguous();
  const Tensor index = positions.contiguous();
  const Tensor weight = weights.to(at::kFloat).contiguous();
  const int64_t num_positions = index.size(0);
  const int64_t* position = index.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < num_positions; ++p) {
    TORCH_CHECK_INDEX(
        position[p] >= 0 && position[p] < rows,
        "neuron_scores: position ", position[p], " is outside [0, ", rows, ")");
  }
  Tensor scores = at::empty({width}, activation.options().dtype(at::kFloat));
  float* score = scores.mutable_data_ptr<float>();

  constexpr int64_t kBlock = 128;  // columns whose sums stay in the first-level cache
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * (num_positions + 1)));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, activation.scalar_type(), "neuron_scores", [&] {
        using acc_t = accumulate_t<scalar_t>;
        const scalar_t* a_data = a.const_data_ptr<scalar_t>();
        const scalar_t* g_data = g.const_data_ptr<scalar_t>();
        const float* w_data = weight.const_data_ptr<float>();
        const auto add = absolute ? &add_scores<scalar_t, true> : &add_scores<scalar_t, false>;
        at::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
          for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * kBlock;
            const int64_t end = std::min(width, begin + kBlock);
            acc_t sums[kBlock] = {};
            add(a_data, a.stride(0), g_data, g.stride(0), position, w_data, num_positions, begin,
                end, sums);
            for (int64_t j = begin; j < end; ++j) {
              score[j] = static_cast<float>(sums[j - begin]);
            }
          }
        });
      });
  return scores;
}

}  // namespace trelm
