// How a refusal travels to Python.
//
// The stable ABI carries only std::runtime_error. A tag in front of the text tells
// flash_attn_ext/_errors.py which exception to raise in its place.
#pragma once

#include <stdexcept>
#include <string>

#include "core/describe.h"

namespace fae::torch_ops {

[[noreturn]] inline void raise(CallError::Kind kind, const std::string& text) {
  const char* tag = kind == CallError::Kind::kValue  ? "[fae:value] "
                    : kind == CallError::Kind::kType ? "[fae:type] "
                                                     : "[fae:not_implemented] ";
  throw std::runtime_error(tag + text);
}

inline void check_call(const CallDesc& call) {
  if (const auto error = validate(call)) raise(error->kind, error->text);
}

}  // namespace fae::torch_ops
