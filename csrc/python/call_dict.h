// A call described by a Python dict, for introspection without tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <list>
#include <string>

#include "core/describe_cache.h"

namespace fae::python {

// Keeps the names that its descriptions point to.
class TensorsFromDict {
 protected:
  // (shape, stride, dtype, device[, data_ptr]) or None.
  TensorDesc tensor(const pybind11::dict& dict, const char* key);

 private:
  std::list<std::string> names_;
};

// The CallDesc of {"q": (shape, stride, dtype, device[, data_ptr]), "k": ..., "v": ...,
// "mask", "bias", "kv_lengths", "out": the same or None, "layout", "causal",
// "window": (left, right), "scale", "softcap"}. Absent keys mean the default.
class CallFromDict : TensorsFromDict {
 public:
  explicit CallFromDict(const pybind11::dict& dict);
  const CallDesc& call() const { return call_; }

 private:
  CallDesc call_;
};

// The CacheCallDesc of its tensors, described likewise, and numbers, each by its name.
class CacheCallFromDict : TensorsFromDict {
 public:
  explicit CacheCallFromDict(const pybind11::dict& dict);
  const CacheCallDesc& call() const { return call_; }

 private:
  CacheCallDesc call_;
};

}  // namespace fae::python
