#include "cuda_case.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/emu/launch.h"

namespace fae::testing {
namespace {

namespace emu = cuda::emu;

emu::Extent extent_of(const HostTensor& t) {
  emu::Extent extent;
  extent.element_bytes = size_t(size_of(t.dtype()));
  extent.rank = 4;
  const View4 view = t.view();
  for (int axis = 0; axis < 4; ++axis) {
    extent.shape[axis] = t.shape()[axis];
    extent.stride[axis] = view.stride[axis];
  }
  return extent;
}

// As an allocator on a device aligns it.
struct alignas(256) MemoryBlock { std::byte bytes[256]; };

// What one launch may touch, for as long as this lives.
class Ranges {
 public:
  void read(const HostTensor& t, const char* name) {
    if (t.count() > 0) ranges_.emplace_back(t.view().data, extent_of(t), name, emu::Access::kRead);
  }
  void read(const void* data, size_t bytes, const char* name) {
    if (bytes > 0) ranges_.emplace_back(data, bytes, name, emu::Access::kRead);
  }
  void write(const HostTensor& t, const char* name) {
    if (t.count() > 0) add_output(t.view().data, extent_of(t), name);
  }
  void write(void* data, size_t bytes, const char* name) {
    if (bytes > 0) add_output(data, emu::Extent::of_bytes(bytes), name);
  }
  void scratch(void* data, size_t bytes, const char* name) {
    if (bytes > 0) {
      ranges_.emplace_back(data, bytes, name, emu::Access::kReadWrite, emu::Contents::kUnset);
    }
  }
  void inputs(const Case& c) {
    read(c.q, "q");
    read(c.k, "k");
    read(c.v, "v");
    if (c.spec.bias != Extent::kNone) read(c.bias, "bias");
    read(c.slopes, "alibi_slopes");
    read(c.sinks, "sinks");
    if (c.spec.dropout_p > 0) read(c.rng_state, sizeof(c.rng_state), "rng_state");
    if (c.mask) read(c.mask->data(), c.mask->size(), "mask");
    read(c.labels.data(), c.labels.size() * 4, "row_labels");
    read(c.bounds.data(), c.bounds.size() * 4, "key_bounds");
    if (c.lengths32) read(c.lengths32->data(), c.lengths32->size() * 4, "kv_lengths");
    if (c.lengths64) read(c.lengths64->data(), c.lengths64->size() * 8, "kv_lengths");
  }
  void check_outputs() const {
    for (const Output& out : outputs_) {
      if (emu::global_memory().first_unset(out.id) >= 0) {
        throw std::runtime_error(std::string(out.name) + " was not written everywhere");
      }
    }
  }

 private:
  struct Output {
    int id;
    const char* name;
  };
  void add_output(void* data, const emu::Extent& extent, const char* name) {
    ranges_.emplace_back(data, extent, name, emu::Access::kReadWrite, emu::Contents::kUnset);
    outputs_.push_back({ranges_.back().id(), name});
  }

  std::vector<emu::ScopedRange> ranges_;
  std::vector<Output> outputs_;
};

void require(const cuda::Plan& plan) {
  for (const std::string& objection : plan.objections) throw std::runtime_error(objection);
}

void set_options(const EmulatedRun& run) {
  emu::options().seed = run.seed;
  emu::options().count = run.count;
}

void run_planned(Ranges& ranges, Case& c, const ForwardCall& call, size_t lse_bytes, const EmulatedRun& run) {
  set_options(run);
  ranges.inputs(c);
  ranges.write(c.out, "out");
  if (call.lse.present()) ranges.write(call.lse.data, lse_bytes, "lse");
  const cuda::Plan plan = cuda::plan_forward(call.problem, run.device, run.options);
  require(plan);
  std::vector<MemoryBlock> workspace(plan.workspace_bytes / 256 + 1);
  Ranges scratch;  // no longer than the workspace
  scratch.scratch(workspace.data(), plan.workspace_bytes, "workspace");
  cuda::forward(call, plan, workspace.data(), nullptr);
}

void run_planned(Ranges& ranges, Case& c, const BackwardCall& call, const EmulatedRun& run) {
  set_options(run);
  const cuda::Plan plan =
      cuda::plan_backward(call.problem, run.device, run.options, cuda::more_gradients(call));
  require(plan);
  std::vector<MemoryBlock> workspace(plan.workspace_bytes / 256 + 1);
  ranges.inputs(c);
  ranges.read(c.out, "out");
  ranges.read(c.dout, "dout");
  ranges.read(c.lse->data(), c.lse->size(), "lse");
  if (c.dlse) ranges.read(c.dlse->data(), c.dlse->size(), "dlse");
  Ranges scratch;  // no longer than the workspace
  scratch.scratch(workspace.data(), plan.workspace_bytes, "workspace");
  ranges.write(c.dq, "dq");
  ranges.write(c.dk, "dk");
  ranges.write(c.dv, "dv");
  if (call.dbias.present()) ranges.write(c.dbias, "dbias");
  if (call.dalibi.present()) ranges.write(c.dalibi, "dalibi_slopes");
  if (call.dsinks.present()) ranges.write(c.dsinks, "dsinks");
  cuda::backward(call, plan, workspace.data(), nullptr);
}

}  // namespace

void launch_forward(Case& c, const ForwardCall& call, size_t lse_bytes, const EmulatedRun& run) {
  Ranges ranges;
  run_planned(ranges, c, call, lse_bytes, run);
}

void launch_backward(Case& c, const BackwardCall& call, const EmulatedRun& run) {
  Ranges ranges;
  run_planned(ranges, c, call, run);
}

ForwardResult run_forward(Case& c, const EmulatedRun& run) {
  c.clear_results();
  Ranges ranges;
  run_planned(ranges, c, c.forward_call(), c.lse->size(), run);
  ranges.check_outputs();
  return {c.out.values(), c.lse_values()};
}

BackwardResult run_backward(Case& c, const EmulatedRun& run) {
  run_forward(c, run);
  for (HostTensor* t : {&c.dq, &c.dk, &c.dv, &c.dbias, &c.dalibi, &c.dsinks}) t->fill(std::nan(""));
  Ranges ranges;
  run_planned(ranges, c, c.backward_call(), run);
  ranges.check_outputs();
  return {c.dq.values(),    c.dk.values(),     c.dv.values(),
          c.dbias.values(), c.dalibi.values(), c.dsinks.values()};
}

}  // namespace fae::testing
