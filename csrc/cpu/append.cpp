#include "cpu/append.h"

#include <algorithm>

namespace fae::cpu {
namespace {

template <class S>
using Arithmetic = decltype(to_float(S{}));

struct Row {
  void* data;
  int64_t offset, stride;
  template <class S>
  S& at(int64_t c) const {
    return static_cast<S*>(data)[offset + c * stride];
  }
};

template <class S>
void copy_row(const Row& from, const Row& to, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) to.at<S>(c) = from.at<S>(c);
}

// Rounded once, at the end.
template <class S>
void rotate_row(const Row& from, const Row& to, int64_t dim, const Rotary& rotary, int64_t position) {
  using Real = Arithmetic<S>;
  const int64_t step = rotary.interleaved ? 2 : 1, partner = rotary.interleaved ? 1 : rotary.pairs;
  for (int64_t n = 0; n < rotary.pairs; ++n) {
    const Real cos = Real(load_as_double(rotary.cos, rotary.cos_dtype,
                                         position * rotary.cos_stride[0] + n * rotary.cos_stride[1]));
    const Real sin = Real(load_as_double(rotary.sin, rotary.sin_dtype,
                                         position * rotary.sin_stride[0] + n * rotary.sin_stride[1]));
    const Real x = to_float(from.at<S>(n * step)), y = to_float(from.at<S>(n * step + partner));
    to.at<S>(n * step) = from_double<S>(double(x * cos - y * sin));
    to.at<S>(n * step + partner) = from_double<S>(double(y * cos + x * sin));
  }
  copy_row<S>(from, to, 2 * rotary.pairs, dim);
}

template <class Fn>
void with_storage(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat16: return fn(Float16{});
    case DType::kBFloat16: return fn(BFloat16{});
    case DType::kFloat64: return fn(double{});
    default: return fn(float{});
  }
}

Row row_of(const View4& x, int64_t b, int64_t head, int64_t row) {
  return {x.data, x.offset(b, head, row), x.stride[3]};
}

// Below this much per thread, waking another thread costs more than it saves.
constexpr int64_t kBytesPerThread = 64 << 10;

Executor limited(const Executor& executor, int64_t bytes) {
  Executor result = executor;
  result.threads = int(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(executor.threads, 1)));
  return result;
}

}  // namespace

void append(const Problem& p, const View4& k, const View4& v, const Rotary& rotary,
            const Executor& executor) {
  const KeyCache& cache = p.cache;
  const int64_t bytes = p.batch * cache.added * p.heads_kv * (p.dim + p.dim_v) * size_of(p.dtype);
  // By heads: sequences that share a place come one after the other.
  for_each_task(limited(executor, bytes), p.heads_kv, [&](int, int64_t head) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence = p.sequence(b);
      const int64_t filled = cache.filled(b) - sequence.first_key;
      for (int64_t i = 0; i < cache.added; ++i) {
        const Row key{p.k.data, p.key_offset(p.k, sequence, head, filled + i), p.k.stride[3]};
        const Row value{p.v.data, p.key_offset(p.v, sequence, head, filled + i), p.v.stride[3]};
        with_storage(p.dtype, [&](auto storage) {
          using S = decltype(storage);
          if (rotary.present()) rotate_row<S>(row_of(k, b, head, i), key, p.dim, rotary, cache.filled(b) + i);
          else copy_row<S>(row_of(k, b, head, i), key, 0, p.dim);
          copy_row<S>(row_of(v, b, head, i), value, 0, p.dim_v);
        });
      }
    }
  });
}

void rotate_queries(const Problem& p, const View4& out, const Rotary& rotary, bool moving,
                    const Executor& executor) {
  const int64_t bytes = p.batch * p.seq_q * p.heads_q * p.dim * size_of(p.dtype);
  for_each_task(limited(executor, bytes), p.batch * p.heads_q, [&](int, int64_t task) {
    const int64_t b = task / p.heads_q, head = task % p.heads_q;
    const int64_t first = p.cache.filled(b);
    with_storage(p.dtype, [&](auto storage) {
      for (int64_t i = 0; i < p.seq_q; ++i) {
        rotate_row<decltype(storage)>(row_of(p.q, b, head, i), row_of(out, b, head, i), p.dim, rotary,
                                      moving ? first + i : first);
      }
    });
  });
}

}  // namespace fae::cpu
