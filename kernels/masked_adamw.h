// AdamW on the path entries of a flat fragment, one pass in place; nothing else is written.
#pragma once

#include "common.h"

#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace trelm {

// 1 - beta^t for t = 0, 1, ..., up to the t from which it is 1 in double precision. Kept between
// calls: with a count per element, computing it would cost more than the update itself.
class Correction {
 public:
  static std::shared_ptr<const Correction> get(double beta) {
    static std::mutex mutex;
    static std::unordered_map<double, std::shared_ptr<const Correction>> known;
    std::lock_guard<std::mutex> guard(mutex);
    auto& entry = known[beta];
    if (!entry) {
      entry = std::make_shared<const Correction>(beta);
    }
    return entry;
  }
  explicit Correction(double beta) {
    const double last = beta > 0 ? std::ceil(-54 * std::log(2.0) / std::log(beta)) : 1;
    for (double t = 0; t <= last; ++t) {
      values.push_back(1 - std::pow(beta, t));
      roots.push_back(std::sqrt(values.back()));
      narrow_roots.push_back(static_cast<float>(roots.back()));
    }
  }
  std::vector<double> values, roots;
  std::vector<float> narrow_roots;
};

constexpr int64_t kPrefetchElements = 256;  // 1 KiB ahead in float32, the best of 128 to 1024

// The update's numbers; -lr / (1 - beta1^t) and sqrt(1 - beta2^t) depend on an entry's count t.
template <typename T>
struct AdamW {
  AdamW(double lr, double beta1, double beta2, double eps, double weight_decay)
      : second(Correction::get(beta2)),
        decay(static_cast<T>(1 - lr * weight_decay)),
        lerp_weight(static_cast<T>(1 - beta1)),
        beta2(static_cast<T>(beta2)),
        square_weight(static_cast<T>(1 - beta2)),
        eps(static_cast<T>(eps)) {
    for (const double correction : Correction::get(beta1)->values) {
      negative_steps.push_back(static_cast<T>(-(lr / correction)));
    }
  }

  T negative_step(int64_t t) const {
    return negative_steps[std::min<int64_t>(t, negative_steps.size() - 1)];
  }
  const std::vector<T>& denominator_scales() const {
    if constexpr (std::is_same_v<T, float>) {
      return second->narrow_roots;
    } else {
      return second->roots;
    }
  }
  T denominator_scale(int64_t t) const {
    return denominator_scales()[std::min<int64_t>(t, second->roots.size() - 1)];
  }

  // torch.optim.AdamW's fused arithmetic, operation for operation. The last, partial vector goes
  // through the same instructions: an entry's result must not depend on where a partition cuts.
  template <bool per_element>
  void update(
      T* param, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t size, const T* steps,
      const T* scales, int64_t reach = 0) const {
    using Vec = Vectorized<T>;
    // lerp in the form that torch takes, exact at both ends
    const bool near = std::abs(lerp_weight) < T(0.5);
    const Vec coefficient(near ? lerp_weight : lerp_weight - T(1));
    const auto update_vector = [&](int64_t i, const auto& load, const auto& store) {
      const Vec g = load(grad + i);
      Vec m = load(exp_avg + i);
      m = at::vec::fmadd(coefficient, g - m, near ? m : g);
      const Vec v =
          at::vec::fmadd(Vec(square_weight) * g, g, load(exp_avg_sq + i) * Vec(beta2));
      const Vec step = per_element ? load(steps + i) : Vec(*steps);
      const Vec scale = per_element ? load(scales + i) : Vec(*scales);
      const Vec p = load(param + i) * Vec(decay) + step * m / (v.sqrt() / scale + Vec(eps));
      store(m, exp_avg + i);
      store(v, exp_avg_sq + i);
      store(p, param + i);
    };
    const auto load_whole = [](const T* from) { return Vec::loadu(from); };
    const auto store_whole = [](const Vec& value, T* to) { value.store(to); };
    const int64_t whole = size - size % Vec::size();
    int64_t i = 0;
    // The hardware's prefetchers stop at each page of four streams; asking ahead keeps them going.
    // Not beyond `reach`: what follows is off the path.
    const int64_t ahead = std::min(whole, reach - kPrefetchElements);
    for (; i < ahead; i += Vec::size()) {
      __builtin_prefetch(param + i + kPrefetchElements, 1);
      __builtin_prefetch(grad + i + kPrefetchElements, 0);
      __builtin_prefetch(exp_avg + i + kPrefetchElements, 1);
      __builtin_prefetch(exp_avg_sq + i + kPrefetchElements, 1);
      update_vector(i, load_whole, store_whole);
    }
    for (; i < whole; i += Vec::size()) {
      update_vector(i, load_whole, store_whole);
    }
    if (const int64_t rest = size - whole) {
      update_vector(
          whole, [rest](const T* from) { return Vec::loadu(from, rest); },
          [rest](const Vec& value, T* to) { value.store(to, rest); });
    }
  }

  std::vector<T> negative_steps;
  std::shared_ptr<const Correction> second;
  T decay, lerp_weight, beta2, square_weight, eps;
};

// Elements [begin, end) of the fragment: (a part of) one row, or of several with one count t.
struct Span {
  int64_t begin, end, count;
  int64_t reach;  // end of the path's run of neighbouring rows, whatever their counts
};

constexpr int64_t kSpanElements = 4096;  // one thread's unit of work

// The path rows' elements in order; neighbouring rows of equal count are one span.
inline std::vector<Span> active_spans(
    const int64_t* row_counts, int64_t fragment_start, int64_t size, int64_t row_length) {
  std::vector<Span> rows;
  const int64_t last_row = (fragment_start + size - 1) / row_length;
  for (int64_t row = fragment_start / row_length; row <= last_row; ++row) {
    if (row_counts[row] <= 0) {
      continue;
    }
    const int64_t begin = std::max<int64_t>(0, row * row_length - fragment_start);
    const int64_t end = std::min(size, (row + 1) * row_length - fragment_start);
    if (!rows.empty() && rows.back().end == begin && rows.back().count == row_counts[row]) {
      rows.back().end = rows.back().reach = end;
    } else {
      rows.push_back({begin, end, row_counts[row], end});
    }
  }
  for (size_t i = rows.size(); i-- > 1;) {
    if (rows[i - 1].end == rows[i].begin) {
      rows[i - 1].reach = rows[i].reach;
    }
  }
  std::vector<Span> spans;
  for (const Span& row : rows) {
    for (int64_t begin = row.begin; begin < row.end; begin += kSpanElements) {
      spans.push_back({begin, std::min(row.end, begin + kSpanElements), row.count, row.reach});
    }
  }
  return spans;
}

// to[i] = table[min(t_i, last)]; an element that was never updated is masked and takes t = 1
template <typename T>
void look_up(
    const std::vector<T>& table, const float* __restrict__ counts, int64_t size,
    T* __restrict__ to) {
  const T* values = table.data();
  const int32_t last = static_cast<int32_t>(table.size()) - 1;
  for (int64_t i = 0; i < size; ++i) {
    to[i] = values[std::clamp(static_cast<int32_t>(counts[i]), 1, last)];
  }
}

template <typename scalar_t, typename T>
void widen(const scalar_t* __restrict__ from, T* __restrict__ to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

template <typename scalar_t, typename T>
void write_back(
    const T* __restrict__ from, const int32_t* __restrict__ active, scalar_t* __restrict__ to,
    int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const scalar_t value = static_cast<scalar_t>(from[i]);
    to[i] = active[i] ? value : to[i];
  }
}

// A span with 16-bit storage, a column mask or a count of its own per element: worked on in small
// wide copies, of which only the path entries are written back.
template <typename scalar_t, typename T>
void update_buffered(
    const AdamW<T>& adamw, const Span& span, scalar_t* param, const scalar_t* grad,
    scalar_t* exp_avg, scalar_t* exp_avg_sq, float* update_count, const uint8_t* columns,
    int64_t first_column, int64_t row_length) {
  constexpr int64_t kBuffer = 256;
  T p[kBuffer], g[kBuffer], m[kBuffer], v[kBuffer], steps[kBuffer], scales[kBuffer];
  int32_t active[kBuffer];
  std::fill(active, active + kBuffer, 1);
  for (int64_t begin = span.begin; begin < span.end; begin += kBuffer) {
    const int64_t n = std::min(kBuffer, span.end - begin);
    widen(param + begin, p, n);
    widen(grad + begin, g, n);
    widen(exp_avg + begin, m, n);
    widen(exp_avg_sq + begin, v, n);
    if (columns) {
      int64_t column = (first_column + begin) % row_length;
      for (int64_t i = 0; i < n; column = 0) {  // up to the end of each row
        const int64_t end = std::min(n, i + row_length - column);
        for (; i < end; ++i, ++column) {
          active[i] = columns[column] != 0;
        }
      }
    }
    if (update_count) {
      for (int64_t i = 0; i < n; ++i) {
        update_count[begin + i] += static_cast<float>(active[i]);
      }
      look_up(adamw.negative_steps, update_count + begin, n, steps);
      look_up(adamw.denominator_scales(), update_count + begin, n, scales);
      adamw.template update<true>(p, g, m, v, n, steps, scales);
    } else {
      steps[0] = adamw.negative_step(span.count);
      scales[0] = adamw.denominator_scale(span.count);
      adamw.template update<false>(p, g, m, v, n, steps, scales);
    }
    write_back(p, active, param + begin, n);
    write_back(m, active, exp_avg + begin, n);
    write_back(v, active, exp_avg_sq + begin, n);
  }
}

template <typename scalar_t, typename T>
void update_span(
    const AdamW<T>& adamw, const Span& span, scalar_t* param, const scalar_t* grad,
    scalar_t* exp_avg, scalar_t* exp_avg_sq, float* update_count, const uint8_t* columns,
    int64_t first_column, int64_t row_length) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    if (!columns && !update_count) {
      const T step = adamw.negative_step(span.count);
      const T scale = adamw.denominator_scale(span.count);
      adamw.template update<false>(
          param + span.begin, grad + span.begin, exp_avg + span.begin, exp_avg_sq + span.begin,
          span.end - span.begin, &step, &scale, span.reach - span.begin);
      return;
    }
  }
  update_buffered<scalar_t, T>(
      adamw, span, param, grad, exp_avg, exp_avg_sq, update_count, columns, first_column,
      row_length);
}

inline void masked_adamw_(
    Tensor& param,
    const Tensor& grad,
    Tensor& exp_avg,
    Tensor& exp_avg_sq,
    int64_t fragment_start,
    int64_t row_length,
    const Tensor& row_counts,
    const std::optional<Tensor>& columns,
    const std::optional<Tensor>& update_count,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay) {
  const int64_t size = param.numel();
  for (const Tensor& t : {param, grad, exp_avg, exp_avg_sq}) {
    TORCH_CHECK(
        t.dim() == 1 && t.is_contiguous() && t.numel() == size &&
            t.scalar_type() == param.scalar_type(),
        "masked_adamw_: param, grad, exp_avg and exp_avg_sq must be contiguous, flat, of one "
        "length and one dtype");
  }
  // By division: products of numbers from elsewhere may not fit.
  TORCH_CHECK(
      row_length > 0 && row_length < (int64_t{1} << 40) && fragment_start >= 0 &&
          fragment_start / row_length <= row_counts.numel() &&
          (size + fragment_start % row_length + row_length - 1) / row_length <=
              row_counts.numel() - fragment_start / row_length,
      "masked_adamw_: ", size, " elements from ", fragment_start,
      " lie outside a matrix of ", row_counts.numel(), " rows of ", row_length);
  TORCH_CHECK(
      beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1,
      "masked_adamw_: beta1 and beta2 must be in [0, 1)");
  TORCH_CHECK(
      row_counts.scalar_type() == at::kLong && row_counts.dim() == 1,
      "masked_adamw_: row_counts must be int64 [f]");
  TORCH_CHECK(
      !columns || (columns->scalar_type() == at::kByte && columns->numel() == row_length),
      "masked_adamw_: columns must be uint8 [row_length]");
  TORCH_CHECK(
      !update_count ||
          (update_count->scalar_type() == at::kFloat && update_count->is_contiguous() &&
           update_count->numel() == size),
      "masked_adamw_: update_count must be float32, contiguous and as long as param");
  if (size == 0) {
    return;
  }
  const Tensor counts = row_counts.contiguous();
  const Tensor mask = columns ? columns->contiguous() : Tensor();
  const uint8_t* column = columns ? mask.const_data_ptr<uint8_t>() : nullptr;
  float* element_count = update_count ? update_count->mutable_data_ptr<float>() : nullptr;
  const std::vector<Span> spans = active_spans(
      counts.const_data_ptr<int64_t>(), fragment_start, size, row_length);
  if (spans.empty()) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, param.scalar_type(), "masked_adamw_", [&] {
        using T = accumulate_t<scalar_t>;
        const AdamW<T> adamw(lr, beta1, beta2, eps, weight_decay);
        scalar_t* p = param.mutable_data_ptr<scalar_t>();
        const scalar_t* g = grad.const_data_ptr<scalar_t>();
        scalar_t* m = exp_avg.mutable_data_ptr<scalar_t>();
        scalar_t* v = exp_avg_sq.mutable_data_ptr<scalar_t>();
        constexpr int64_t grain = kGrainElements / kSpanElements;
        at::parallel_for(0, spans.size(), grain, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            update_span<scalar_t, T>(
                adamw, spans[i], p, g, m, v, element_count, column, fragment_start, row_length);
          }
        });
      });
}

}  // namespace trelm
