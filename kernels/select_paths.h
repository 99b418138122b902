// The k best neurons of a layer, the same on every rank for the same scores.
#pragma once

#include "common.h"

#include <ATen/ops/empty.h>

namespace trelm {

inline Tensor select_paths(
    const Tensor& scores, int64_t k, bool positive_only, double threshold) {
  TORCH_CHECK(scores.dim() == 1, "select_paths: scores must be [f], got ", scores.sizes());
  TORCH_CHECK(k >= 0, "select_paths: k must not be negative, got ", k);
  TORCH_CHECK(
      threshold >= 0 && threshold <= 1, "select_paths: threshold must be in [0, 1], got ",
      threshold);
  const Tensor wide = scores.to(at::kDouble).contiguous();
  const double* score = wide.const_data_ptr<double>();
  std::vector<int64_t> kept;
  double largest = -INFINITY;
  for (int64_t j = 0; j < wide.size(0); ++j) {
    if (std::isnan(score[j]) || (positive_only && !(score[j] > 0))) {
      continue;
    }
    kept.push_back(j);
    largest = std::max(largest, score[j]);
  }
  if (threshold > 0) {
    // A share of a largest score that is not positive would admit everything or nothing by its
    // sign alone: nothing is meant.
    const double floor = largest > 0 ? threshold * largest : INFINITY;
    kept.erase(
        std::remove_if(kept.begin(), kept.end(), [&](int64_t j) { return score[j] < floor; }),
        kept.end());
  }
  if (static_cast<int64_t>(kept.size()) > k) {
    const auto better = [&](int64_t i, int64_t j) {
      return score[i] != score[j] ? score[i] > score[j] : i < j;
    };
    std::nth_element(kept.begin(), kept.begin() + k, kept.end(), better);
    kept.resize(k);
    std::sort(kept.begin(), kept.end());
  }
  Tensor rows =
      at::empty({static_cast<int64_t>(kept.size())}, scores.options().dtype(at::kLong));
  std::copy(kept.begin(), kept.end(), rows.mutable_data_ptr<int64_t>());
  return rows;
}

}  // namespace trelm
