// Weight gradient of a linear map restricted to some of its output rows: a dense GEMM over them.
#pragma once

#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cstring>

namespace trelm {

// compact[n, i] = matrix[n, columns[i]]; matrix has unit stride in its rows.
template <typename scalar_t>
void gather_columns(
    const Tensor& matrix, const int64_t* columns, int64_t count, Tensor& compact) {
  const scalar_t* source = matrix.const_data_ptr<scalar_t>();
  scalar_t* target = compact.mutable_data_ptr<scalar_t>();
  const int64_t stride = matrix.stride(0);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / count);
  at::parallel_for(0, matrix.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      for (int64_t i = 0; i < count; ++i) {
        target[n * count + i] = source[n * stride + columns[i]];
      }
    }
  });
}

inline Tensor path_weight_grad(
    const Tensor& grad_out, const Tensor& inputs, const Tensor& rows) {
  TORCH_CHECK(
      grad_out.dim() == 2 && inputs.dim() == 2 && grad_out.size(0) == inputs.size(0),
      "path_weight_grad: grad_out must be [N, f] and inputs [N, d], got ", grad_out.sizes(),
      " and ", inputs.sizes());
  TORCH_CHECK(
      grad_out.scalar_type() == inputs.scalar_type(),
      "path_weight_grad: grad_out and inputs must be of one dtype");
  TORCH_CHECK(
      rows.dim() == 1 && rows.scalar_type() == at::kLong, "path_weight_grad: rows must be int64 [k]");
  const int64_t width = grad_out.size(1);
  const int64_t depth = inputs.size(1);
  const int64_t count = rows.size(0);
  const Tensor index = rows.contiguous();
  const int64_t* row = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(
        row[i] >= 0 && row[i] < width && (i == 0 || row[i - 1] < row[i]),
        "path_weight_grad: rows must ascend strictly within [0, ", width, ")");
  }
  Tensor out = at::empty({width, depth}, inputs.options());
  if (count == 0) {
    return out.zero_();
  }
  if (row[count - 1] - row[0] + 1 == count) {  // one block: views of both ends, nothing is copied
    out.narrow(0, 0, row[0]).zero_();
    out.narrow(0, row[0] + count, width - row[0] - count).zero_();
    Tensor block = out.narrow(0, row[0], count);
    at::mm_out(block, grad_out.narrow(1, row[0], count).t(), inputs);
    return out;
  }
  const Tensor matrix = grad_out.stride(1) == 1 ? grad_out : grad_out.contiguous();
  Tensor compact = at::empty({matrix.size(0), count}, matrix.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, matrix.scalar_type(), "path_weight_grad",
      [&] { gather_columns<scalar_t>(matrix, row, count, compact); });
  const Tensor product = at::mm(compact.t(), inputs).contiguous();

  // Every row of the result is written once: from the product, or zero.
  const size_t row_bytes = depth * out.element_size();
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const char* source = static_cast<const char*>(product.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, depth));
  at::parallel_for(0, width, grain, [&](int64_t first, int64_t last) {
    int64_t next = std::lower_bound(row, row + count, first) - row;
    for (int64_t j = first; j < last; ++j) {
      if (next < count && row[next] == j) {
        std::memcpy(target + j * row_bytes, source + next * row_bytes, row_bytes);
        ++next;
      } else {
        std::memset(target + j * row_bytes, 0, row_bytes);
      }
    }
  });
  return out;
}

}  // namespace trelm
