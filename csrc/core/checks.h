// What the parts of validate() share.
#pragma once

#include <optional>
#include <string>

#include "core/describe.h"

namespace fae::checks {

using Kind = CallError::Kind;

struct Named {
  const char* name;
  const TensorDesc* tensor;
};

inline std::string quoted(const Named& t) {
  return std::string(t.name) + " has shape " + shape_text(*t.tensor);
}

inline std::string dtype_text(const TensorDesc& t) {
  return t.dtype == DType::kOther && t.dtype_name ? t.dtype_name : name_of(t.dtype);
}

inline CallError value_error(std::string text) { return {Kind::kValue, std::move(text)}; }

// `wanted`: the sizes of `axes`, to which each size of the tensor must be equal, or 1.
std::optional<CallError> check_broadcast(const Named& t, const int64_t wanted[4], const char* axes);

// cu_seqlens of `rows`: its shape, and where they can be read its values. max_length: -1 for any.
std::optional<CallError> check_starts(const Named& t, const Named& rows, int64_t max_length,
                                      const char* max_name);

std::optional<CallError> check_floating(const Named& t);
std::optional<CallError> check_integers(const Named& t);
std::optional<CallError> check_device(const TensorDesc& q, const Named& t);
std::optional<CallError> check_slopes(const TensorDesc& slopes, int64_t batch, int64_t heads_q);
std::optional<CallError> check_options(int64_t window_left, int64_t window_right, std::optional<double> scale,
                                       double softcap);

// Dtypes, shapes and values of the arguments that only extended operators take. The shapes of q, k and v
// have been checked.
std::optional<CallError> check_extended_dtypes(const CallDesc& call);
std::optional<CallError> check_packing(const CallDesc& call);
std::optional<CallError> check_extended(const CallDesc& call, const CallSizes& sizes);

}  // namespace fae::checks
