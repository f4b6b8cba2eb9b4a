// A fixed set of threads, the caller one of them, that works through a numbered list of tasks.
#pragma once

#include <cstddef>
#include <functional>

namespace matryoshka {

class Pool {
 public:
  using Task = std::function<void(size_t task, int thread)>;

  // Throws std::invalid_argument for fewer than one thread or more than kMaxThreads.
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const;

  // Calls task(i, thread) for every i < count, each once, in no fixed order, and returns when all
  // are done. Calls from several threads queue up. The first exception of a task is thrown again
  // here; tasks that had not begun by then are left out.
  void run(size_t count, const Task& task);

  static constexpr int kMaxThreads = 1024;

 private:
  struct State;
  State* state_;
};

}  // namespace matryoshka
