// A fixed set of threads, including the caller, that runs numbered tasks.
#pragma once

#include <cstddef>
#include <functional>

namespace matryoshka {

class Pool {
 public:
  using Task = std::function<void(size_t task, int thread)>;

  // Throws std::invalid_argument unless 1 <= num_threads <= kMaxThreads.
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const;

  // Call task(i, thread) once for every i < count, in any order, and return when all are done.
  // Calls from several threads queue up. Rethrows the first exception of a task; later tasks do not
  // run.
  void run(size_t count, const Task& task);

  static constexpr int kMaxThreads = 1024;

 private:
  struct State;
  State* state_;
};

}  // namespace matryoshka
