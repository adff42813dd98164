// The operators `emulated...`: the CUDA kernels on CPU tensors, run by the host emulator.
//
// Every tensor of a call is registered with the emulator: inputs as read-only memory, outputs as
// unset memory of which every element must have been written at the end.
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/emu/launch.h"
#include "cuda/launch/c_api.h"
#include "torch/cuda_call.h"
#include "torch/schemas.h"

namespace fae::torch_ops {
namespace {

namespace emu = cuda::emu;

std::atomic<uint64_t> schedule_seed{0};

class EmulatedMachine {
 public:
  EmulatedMachine(Place, const ForwardCall& call) {
    const Problem& p = call.problem;
    begin(p);
    write("out", call.out, {entries(p), p.heads_q, rows(p), p.dim_v}, p.dtype);
    if (call.lse.present())
      write("lse", rows_of(call.lse), {entries(p), p.heads_q, rows(p), 1}, lse_dtype(p.dtype));
  }

  EmulatedMachine(Place, const BackwardCall& call) {
    const Problem& p = call.problem;
    begin(p);
    const Shape result = {entries(p), p.heads_q, rows(p), p.dim_v};
    const Shape row_values = {entries(p), p.heads_q, rows(p), 1};
    read("out", call.out, result, p.dtype);
    read("dout", call.dout, result, p.dtype);
    read("lse", rows_of(call.lse), row_values, lse_dtype(p.dtype));
    if (call.dlse.present()) read("dlse", rows_of(call.dlse), row_values, lse_dtype(p.dtype));
    write("dq", call.dq, {entries(p), p.heads_q, rows(p), p.dim}, p.dtype);
    write("dk", call.dk, {entries(p), p.heads_kv, keys(p), p.dim}, p.dtype);
    write("dv", call.dv, {entries(p), p.heads_kv, keys(p), p.dim_v}, p.dtype);
    const int64_t* const shape = call.dbias_shape;
    if (call.dbias.present()) {
      write("dbias", call.dbias, {shape[0], shape[1], shape[2], shape[3]}, p.score.bias_dtype);
    }
    if (call.dalibi.present()) {
      write("dalibi_slopes", heads_of(call.dalibi), {p.batch, p.heads_q, 1, 1}, call.dalibi.dtype);
    }
    if (call.dsinks.present())
      write("dsinks", heads_of(call.dsinks), {1, p.heads_q, 1, 1}, call.dsinks.dtype);
  }

  EmulatedMachine(Place, const CachedCall& call) {
    const Problem& p = call.forward.problem;
    const KeyCache& cache = p.cache;
    const CacheUpdate& update = call.update;
    emu::options().seed = schedule_seed;
    const int64_t length = cache.pages.present() ? cache.pages.page_size : cache.capacity;
    const int64_t packed = p.packing.present() ? 1 : p.batch;
    change("k_cache", p.k, {cache.entries, p.heads_kv, length, p.dim}, p.dtype, update.k.present());
    change("v_cache", p.v, {cache.entries, p.heads_kv, length, p.dim_v}, p.dtype, update.k.present());
    read("q", p.q, {packed, p.heads_q, rows(p), p.dim}, p.dtype);
    read_of_heads(p);
    if (update.k.present()) {
      read("k", update.k, {p.batch, p.heads_kv, cache.added, p.dim}, p.dtype);
      read("v", update.v, {p.batch, p.heads_kv, cache.added, p.dim_v}, p.dtype);
    }
    if (const Rotary& rotary = update.rotary; rotary.present()) {
      const Shape table = {1, 1, rotary.positions, rotary.pairs};
      read("rotary_cos", table_of(rotary.cos, rotary.cos_stride), table, rotary.cos_dtype);
      read("rotary_sin", table_of(rotary.sin, rotary.sin_stride), table, rotary.sin_dtype);
      write("rotated q", update.turned, {packed, p.heads_q, rows(p), p.dim}, p.dtype);
    }
    write("out", call.forward.out, {packed, p.heads_q, rows(p), p.dim_v}, p.dtype);
    if (call.forward.lse.present())
      write("lse", rows_of(call.forward.lse), {packed, p.heads_q, rows(p), 1}, lse_dtype(p.dtype));
  }

  const cuda::Device& device() const { return device_; }
  cuda::Stream stream() const { return nullptr; }

  void use_scratch(void* data, size_t bytes) {
    if (bytes == 0) return;
    ranges_.emplace_back(data, bytes, "workspace", emu::Access::kReadWrite, emu::Contents::kUnset);
  }

  void finish() const {
    for (const auto& [id, name] : outputs_) {
      if (emu::global_memory().first_unset(id) >= 0) {
        throw std::runtime_error(std::string("the CUDA kernels did not write every element of ") + name);
      }
    }
  }

 private:
  struct Shape { int64_t size[4]; };

  void begin(const Problem& p) {
    emu::options().seed = schedule_seed;
    read("q", p.q, {entries(p), p.heads_q, rows(p), p.dim}, p.dtype);
    read("k", p.k, {entries(p), p.heads_kv, keys(p), p.dim}, p.dtype);
    read("v", p.v, {entries(p), p.heads_kv, keys(p), p.dim_v}, p.dtype);
    const Shape scores = {p.batch, p.heads_q, p.seq_q, p.seq_kv};
    if (const BoolMask& mask = p.masking.mask; mask.present()) {
      const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
      read("mask", mask, {p.batch, p.heads_q, blocks(p.seq_q, mask.block_q), blocks(p.seq_kv, mask.block_kv)},
           DType::kBool);
    }
    if (const Intervals& x = p.masking.intervals; x.present()) {
      const auto memory = [](const int32_t* data) { return const_cast<int32_t*>(data); };
      read("row_labels", {memory(x.labels), {x.label_stride[0], x.label_stride[1], x.label_stride[2], 0}},
           {x.count, p.batch, p.seq_q, 1}, DType::kInt32);
      read("key_bounds",
           {memory(x.bounds), {x.bound_stride[0], x.bound_stride[1], x.bound_stride[2], x.bound_stride[3]}},
           {x.count, p.batch, p.seq_kv, 2}, DType::kInt32);
    }
    if (p.score.bias.present()) read("bias", p.score.bias, scores, p.score.bias_dtype);
    read_of_heads(p);
    if (p.dropout.present()) {
      const View4 state = {const_cast<int64_t*>(p.dropout.state), {p.dropout.state_stride, 0, 0, 0}};
      read("rng_state", state, {2, 1, 1, 1}, DType::kInt64);
    }
    const Lengths& lengths = p.masking.kv_lengths;
    if (lengths.data) {
      const View4 view = {const_cast<void*>(lengths.data), {lengths.stride, 0, 0, 0}};
      read("kv_lengths", view, {p.batch, 1, 1, 1}, lengths.is_int64 ? DType::kInt64 : DType::kInt32);
    }
  }

  void read_of_heads(const Problem& p) {
    const PerHead &slopes = p.score.alibi, &sinks = p.score.sinks;
    if (slopes.present()) read("alibi_slopes", heads_of(slopes), {p.batch, p.heads_q, 1, 1}, slopes.dtype);
    if (sinks.present()) read("sinks", heads_of(sinks), {1, p.heads_q, 1, 1}, sinks.dtype);
  }

  // Packed sequences lie in one entry of all their rows.
  static int64_t entries(const Problem& p) { return p.packing.present() ? 1 : p.batch; }
  static int64_t rows(const Problem& p) { return p.packing.present() ? p.packing.total_q : p.seq_q; }
  static int64_t keys(const Problem& p) { return p.packing.present() ? p.packing.total_kv : p.seq_kv; }

  static View4 table_of(const void* data, const int64_t* stride) {
    return {const_cast<void*>(data), {0, 0, stride[0], stride[1]}};
  }

  // What may hold values, and may be written if `changes`.
  void change(const char* name, const View4& view, const Shape& shape, DType dtype, bool changes) {
    ranges_.emplace_back(view.data, extent_of(view, shape, dtype), name,
                         changes ? emu::Access::kReadWrite : emu::Access::kRead);
  }

  template <class Void>
  static View4 rows_of(const RowValues<Void>& values) {
    return {const_cast<void*>(values.data), {values.batch_stride, values.head_stride, 1, 0}};
  }

  static View4 heads_of(const PerHead& values) {
    return {values.data, {values.stride[0], values.stride[1], 0, 0}};
  }

  static emu::Extent extent_of(const View4& view, const Shape& shape, DType dtype) {
    emu::Extent extent;
    extent.element_bytes = size_t(size_of(dtype));
    extent.rank = 4;
    for (int axis = 0; axis < 4; ++axis) {
      extent.stride[axis] = view.stride[axis];
      extent.shape[axis] = view.stride[axis] == 0 && shape.size[axis] > 0 ? 1 : shape.size[axis];
    }
    return extent;
  }

  void read(const char* name, const View4& view, const Shape& shape, DType dtype) {
    ranges_.emplace_back(view.data, extent_of(view, shape, dtype), name, emu::Access::kRead);
  }

  void write(const char* name, const View4& view, const Shape& shape, DType dtype) {
    ranges_.emplace_back(view.data, extent_of(view, shape, dtype), name, emu::Access::kReadWrite,
                         emu::Contents::kUnset);
    outputs_.emplace_back(ranges_.back().id(), name);
  }

  cuda::Device device_;
  std::vector<emu::ScopedRange> ranges_;
  std::vector<std::pair<int, const char*>> outputs_;
};

}  // namespace

void run_forward(const ForwardCall& call, Place place, const RunOptions& options) {
  cuda_forward<EmulatedMachine>(call, place, options);
}

void run_backward(const BackwardCall& call, Place place, const RunOptions& options) {
  cuda_backward<EmulatedMachine>(call, place, options);
}

void run_kvcache(const CachedCall& call, Place place, const RunOptions& options) {
  cuda_kvcache<EmulatedMachine>(call, place, options);
}

}  // namespace fae::torch_ops

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_ext, m) { fae::torch_ops::define(m, "emulated"); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) { fae::torch_ops::implement(m, "emulated"); }

// Another seed, another order of blocks, warps and copies.
extern "C" FAE_EXPORT void fae_emulator_set_seed(uint64_t seed) { fae::torch_ops::schedule_seed = seed; }
