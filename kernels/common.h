// What every kernel shares: ATen's vectors and threads, and loads that widen to the sums' type.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace trelm {

using at::Tensor;
using at::vec::Vectorized;

// Sums over bf16 and fp16 run in float32, over float32 and float64 in their own type.
template <typename scalar_t>
using accumulate_t = at::opmath_type<scalar_t>;

// Vectorized<accumulate_t> elements from `source`, widened where the storage is 16 bit.
template <typename scalar_t>
inline Vectorized<accumulate_t<scalar_t>> load_wide(const scalar_t* source) {
  if constexpr (std::is_same_v<scalar_t, accumulate_t<scalar_t>>) {
    return Vectorized<scalar_t>::loadu(source);
  } else {
    Vectorized<float> wide;
    at::vec::load_to_float<scalar_t>(source, wide);
    return wide;
  }
}

// The widest loops take at least this many elements per thread; below, threads cost more.
constexpr int64_t kGrainElements = 32768;

}  // namespace trelm
