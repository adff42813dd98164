// How a refusal travels to Python.
//
// The stable ABI carries only std::runtime_error. A tag in front of the text tells
// flash_attn_ext/_errors.py which exception to raise in its place.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "core/describe.h"

namespace fae::torch_ops {

[[noreturn]] inline void raise(const CallError& error) {
  const char* tag = error.kind == CallError::Kind::kValue     ? "[fae:value] "
                    : error.kind == CallError::Kind::kType    ? "[fae:type] "
                    : error.kind == CallError::Kind::kRuntime ? "[fae:runtime] "
                                                              : "[fae:not_implemented] ";
  throw std::runtime_error(tag + error.text);
}

// A kernel whose every failure is one that the stable ABI can carry.
template <void (*kernel)(StableIValue*, uint64_t, uint64_t)>
void reporting(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    kernel(stack, inputs, outputs);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("flash_attn_ext: out of memory: the workspace could not be allocated");
  } catch (const std::invalid_argument& error) {  // of the environment, by a backend
    raise({CallError::Kind::kValue, error.what()});
  }
}

}  // namespace fae::torch_ops
