// A call described by a Python dict, for introspection without tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <list>
#include <string>

#include "core/describe.h"

namespace fae::python {

// The CallDesc of {"q": (shape, stride, dtype, device[, data_ptr]), "k": ..., "v": ...,
// "mask", "bias", "kv_lengths", "out": the same or None, "layout", "causal",
// "window": (left, right), "scale", "softcap"}. Absent keys mean the default.
class CallFromDict {
 public:
  explicit CallFromDict(const pybind11::dict& dict);
  const CallDesc& call() const { return call_; }

 private:
  TensorDesc tensor(const pybind11::dict& dict, const char* key);

  CallDesc call_;
  std::list<std::string> names_;  // that the description points to
};

}  // namespace fae::python
