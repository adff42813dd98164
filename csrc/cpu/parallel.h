// Threads are the caller's: torch's pool for the ops, std::thread for the module.
#pragma once

#include <atomic>
#include <cstdint>

namespace fae::cpu {

// run(context, workers, body, arg) calls body(arg, w) once for each w in
// [0, workers), on as many threads as it likes, and returns when all are done.
struct Executor {
  int threads = 1;
  void* context = nullptr;
  void (*run)(void* context, int workers, void (*body)(void* arg, int worker), void* arg) = nullptr;
};

// Workers draw task numbers from one counter, so that a slow task delays nobody;
// tasks are numbered most expensive first. Which worker takes which task never
// changes a result. fn(worker, task).
template <class Fn>
void for_each_task(const Executor& executor, int64_t tasks, Fn&& fn) {
  if (tasks <= 0) return;
  const int64_t wanted = executor.run ? executor.threads : 1;
  const int workers = int(wanted < tasks ? wanted : tasks);
  if (workers <= 1) {
    for (int64_t t = 0; t < tasks; ++t) fn(0, t);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    Fn* fn;
  } shared;
  shared.tasks = tasks;
  shared.fn = &fn;
  executor.run(
      executor.context, workers,
      [](void* arg, int worker) {
        auto& s = *static_cast<Shared*>(arg);
        for (int64_t t; (t = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.fn)(worker, t);
      },
      &shared);
}

}  // namespace fae::cpu
