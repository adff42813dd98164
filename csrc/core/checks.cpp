#include "core/checks.h"

#include <cmath>
#include <cstring>

namespace fae::checks {
namespace {

CallError wrong_dtype(const Named& t, const char* allowed) {
  return {Kind::kType,
          std::string(t.name) + " has dtype " + dtype_text(*t.tensor) + ", but must be " + allowed};
}

}  // namespace

std::optional<CallError> check_floating(const Named& t) {
  if (!t.tensor->present || is_floating(t.tensor->dtype)) return std::nullopt;
  return wrong_dtype(t, "float16, bfloat16, float32 or float64");
}

std::optional<CallError> check_integers(const Named& t) {
  const DType dtype = t.tensor->dtype;
  if (!t.tensor->present || dtype == DType::kInt32 || dtype == DType::kInt64) return std::nullopt;
  return wrong_dtype(t, "int32 or int64");
}

std::optional<CallError> check_device(const TensorDesc& q, const Named& t) {
  if (!t.tensor->present || std::strcmp(q.device, t.tensor->device) == 0) return std::nullopt;
  return value_error(std::string(t.name) + " is on device " + t.tensor->device +
                     ", but must be on q's device " + q.device);
}

std::optional<CallError> check_slopes(const TensorDesc& slopes, int64_t batch, int64_t heads_q) {
  if (!slopes.present || (slopes.rank == 1 && slopes.shape[0] == heads_q) ||
      (slopes.rank == 2 && slopes.shape[0] == batch && slopes.shape[1] == heads_q)) {
    return std::nullopt;
  }
  const int64_t both[2] = {batch, heads_q};
  return value_error(quoted({"alibi_slopes", &slopes}) + ", but must have shape (heads_q,) = " +
                     shape_text(&heads_q, 1) + " or (batch, heads_q) = " + shape_text(both, 2));
}

std::optional<CallError> check_options(int64_t window_left, int64_t window_right, std::optional<double> scale,
                                       double softcap) {
  if (window_left < -1 || window_right < -1) {
    return value_error("window is (" + std::to_string(window_left) + ", " + std::to_string(window_right) +
                       "), but its entries must be None, -1 (unbounded) or at least 0");
  }
  if (scale && !std::isfinite(*scale)) {
    return value_error("scale is " + std::to_string(*scale) + ", but must be finite");
  }
  if (!std::isfinite(softcap) || softcap < 0) {
    return value_error("softcap is " + std::to_string(softcap) +
                       ", but must be finite and at least 0 (0 = none)");
  }
  return std::nullopt;
}

}  // namespace fae::checks
