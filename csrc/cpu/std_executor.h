// An Executor over short-lived std::threads, for callers without a thread pool.
#pragma once

#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace fae::cpu {

// The body of a parallel region together with the first exception that left it.
// Pools must not see exceptions: they are kept here and rethrown by the caller.
class GuardedBody {
 public:
  GuardedBody(void (*body)(void* arg, int worker), void* arg) : body_(body), arg_(arg) {}

  void operator()(int worker) noexcept {
    try {
      body_(arg_, worker);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow_if_failed() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void (*body_)(void* arg, int worker);
  void* arg_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

inline void run_on_std_threads(void* /*context*/, int workers, void (*body)(void* arg, int worker),
                               void* arg) {
  GuardedBody guarded(body, arg);
  std::vector<std::thread> threads;
  threads.reserve(size_t(workers > 0 ? workers - 1 : 0));
  int next = 1;
  try {
    for (; next < workers; ++next) threads.emplace_back([&guarded, next] { guarded(next); });
  } catch (const std::system_error&) {
    // The system grants no more threads: this one does the rest of the work.
  }
  guarded(0);
  for (; next < workers; ++next) guarded(next);
  for (std::thread& thread : threads) thread.join();
  guarded.rethrow_if_failed();
}

inline Executor std_executor(int threads) { return {threads, nullptr, run_on_std_threads}; }

}  // namespace fae::cpu
