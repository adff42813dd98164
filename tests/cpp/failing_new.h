// Memory that cannot be had: what poisoned_new.cpp makes of new.
#pragma once

#include <cstddef>

namespace fae::testing {

// No allocation of the test program is as large.
constexpr std::size_t kTooManyBytes = std::size_t(1) << 40;

// While it lives, new fails on this thread.
class FailingNew {
 public:
  FailingNew();
  ~FailingNew();
  FailingNew(const FailingNew&) = delete;
  FailingNew& operator=(const FailingNew&) = delete;
};

}  // namespace fae::testing
