#include "pool.hpp"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace matryoshka {

struct Pool::State {
  std::mutex one_run;  // held during a run

  std::mutex mutex;  // guards everything below except `next`
  std::condition_variable work, done;
  uint64_t run_number = 0;
  bool stop = false;
  size_t busy = 0;             // threads in the run, without the caller
  const Task* task = nullptr;  // null between runs
  size_t count = 0;
  std::exception_ptr error;

  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  pid_t owner = getpid();

  void run_tasks(std::unique_lock<std::mutex>& lock, int thread);
  void work_loop(int thread);
  void shut_down();
};

// Run tasks until none is left. The caller holds the lock; it is released meanwhile.
void Pool::State::run_tasks(std::unique_lock<std::mutex>& lock, int thread) {
  const Task& run_task = *task;
  const size_t end = count;
  lock.unlock();
  std::exception_ptr failure;
  try {
    for (;;) {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= end) break;
      run_task(i, thread);
    }
  } catch (...) {
    failure = std::current_exception();
    next.store(end, std::memory_order_relaxed);  // the other threads stop as well
  }
  lock.lock();
  if (failure && !error) error = failure;
}

void Pool::State::work_loop(int thread) {
  std::unique_lock<std::mutex> lock(mutex);
  for (uint64_t seen = 0;;) {
    work.wait(lock, [&] { return stop || run_number != seen; });
    if (stop) return;
    seen = run_number;
    if (!task) continue;  // the run has ended before this thread woke up
    ++busy;
    run_tasks(lock, thread);
    if (--busy == 0) done.notify_one();
  }
}

void Pool::State::shut_down() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    stop = true;
  }
  work.notify_all();
  for (std::thread& thread : threads) thread.join();
}

Pool::Pool(int num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads)
    throw std::invalid_argument("num_threads must be between 1 and 1024");
  state_ = new State;
  try {
    state_->threads.reserve(num_threads - 1);
    for (int i = 1; i < num_threads; ++i)
      state_->threads.emplace_back([s = state_, i] { s->work_loop(i); });
  } catch (...) {  // the system has no more threads
    state_->shut_down();
    delete state_;
    throw;
  }
}

Pool::~Pool() {
  // After a fork, the child has no threads: joining them would hang, destroying them would call
  // std::terminate.
  if (state_->owner != getpid()) return;
  state_->shut_down();
  delete state_;
}

int Pool::num_threads() const { return static_cast<int>(state_->threads.size()) + 1; }

void Pool::run(size_t count, const Task& task) {
  if (state_->owner != getpid())
    throw std::runtime_error("this Pool belongs to the parent process; make a new one");
  std::lock_guard<std::mutex> one_run(state_->one_run);
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->task = &task;
  state_->count = count;
  state_->error = nullptr;
  state_->next.store(0, std::memory_order_relaxed);
  ++state_->run_number;
  if (count > 1) state_->work.notify_all();  // waking a thread can take longer than a small task
  state_->run_tasks(lock, 0);
  state_->done.wait(lock, [this] { return state_->busy == 0; });
  state_->task = nullptr;
  if (state_->error) std::rethrow_exception(std::exchange(state_->error, nullptr));
}

}  // namespace matryoshka
