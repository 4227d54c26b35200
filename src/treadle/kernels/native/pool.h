// Threads that run one job together: spinning barriers inside it, asleep between jobs.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include <sched.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace treadle {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Pool {
 public:
  const int size;

  explicit Pool(int size) : size(size), process_(getpid()) {
    for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { serve(i); });
  }

  ~Pool() {
    if (!alive()) {  // a fork has the objects of threads, not the threads
      for (auto& thread : threads_) thread.detach();
      return;
    }
    job_ = nullptr;
    start();
    for (auto& thread : threads_) thread.join();
  }

  // False in a child process, where only the calling thread lives on.
  bool alive() const { return getpid() == process_; }

  // job(i) on every thread i, the caller being 0; returns when all are done.
  void run(std::function<void(int)> job) {
    job_ = std::move(job);
    start();
    job_(0);
    barrier();
  }

  void barrier() {
    if (size == 1) return;
    unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    // Where other programs hold the processor, the thread waited for needs ours.
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      spins < kSpins ? relax() : void(sched_yield());
  }

  // Thread i's share of `count` equal pieces.
  std::pair<int, int> share(int count, int i) const {
    return {int(int64_t(count) * i / size), int(int64_t(count) * (i + 1) / size)};
  }

 private:
  static constexpr int kSpins = 4000;
  const pid_t process_;
  std::function<void(int)> job_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<unsigned> jobs_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};

  void start() {
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
  }

  void serve(int i) {
    for (unsigned seen = 0;; ++seen) {
      for (int spins = 0; spins < kSpins && jobs_.load(std::memory_order_acquire) == seen; ++spins)
        relax();
      jobs_.wait(seen, std::memory_order_acquire);
      if (!job_) return;
      job_(i);
      barrier();
    }
  }
};

}  // namespace treadle
