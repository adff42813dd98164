// Threads are the caller's: torch's pool for the ops, std::thread for the module.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace fae::cpu {

// run(context, workers, body, arg) calls body(arg, w) once for each w in
// [0, workers), on as many threads as it likes, and returns when all are done.
struct Executor {
  int threads = 1;
  void* context = nullptr;
  void (*run)(void* context, int workers, void (*body)(void* arg, int worker), void* arg) = nullptr;
};

// How tasks are handed out: in their order, or so that each worker begins with its share of neighbours, whose
// memory lies together and may still be in its cache from the call before, and then helps the others.
enum class Sharing { kInOrder, kNeighbours };

// Workers draw task numbers from counters, so that a slow task delays nobody; in order, tasks are numbered
// most expensive first. Which worker takes which task never changes a result. fn(worker, task).
template <class Fn>
void for_each_task(const Executor& executor, int64_t tasks, Fn&& fn, Sharing sharing = Sharing::kInOrder) {
  if (tasks <= 0) return;
  const int64_t wanted = executor.run ? executor.threads : 1;
  const int workers = int(wanted < tasks ? wanted : tasks);
  if (workers <= 1) {
    for (int64_t t = 0; t < tasks; ++t) fn(0, t);
    return;
  }
  constexpr int kMostQueues = 64;
  struct alignas(64) Queue {  // a line of the cache each
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    Queue queues[kMostQueues];
    int count;
    std::remove_reference_t<Fn>* fn;
  } shared;
  shared.count = sharing == Sharing::kInOrder ? 1 : workers < kMostQueues ? workers : kMostQueues;
  for (int i = 0; i < shared.count; ++i) {
    shared.queues[i].next.store(tasks * i / shared.count, std::memory_order_relaxed);
    shared.queues[i].end = tasks * (i + 1) / shared.count;
  }
  shared.fn = &fn;
  executor.run(
      executor.context, workers,
      [](void* arg, int worker) {
        auto& s = *static_cast<Shared*>(arg);
        for (int i = 0; i < s.count; ++i) {
          Queue& queue = s.queues[(worker + i) % s.count];
          for (int64_t t; (t = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.end;)
            (*s.fn)(worker, t);
        }
      },
      &shared);
}

}  // namespace fae::cpu
