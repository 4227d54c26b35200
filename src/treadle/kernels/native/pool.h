// Threads that run one job together: spinning barriers inside it, asleep between jobs.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
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

  explicit Pool(int size) : size(size), process_(getpid()), taken_(new Taken[size]) {
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

  // piece(0) ... piece(count - 1), each on one thread: first those of the own share, then what
  // others, held up by other programs, have left. All threads call this in turn with the others,
  // and go through a barrier before the next time.
  template <class Piece>
  void each(int thread, int count, Piece piece) {
    Taken& own = taken_[thread];
    const int turn = own.turn;
    own.turn = 1 - turn;
    own.next[1 - turn].store(0, std::memory_order_relaxed);
    for (int step = 0; step < size; ++step) {
      const int victim = (thread + step) % size;
      auto [first, last] = share(count, victim);
      std::atomic<int>& next = taken_[victim].next[turn];
      if (step && next.load(std::memory_order_relaxed) >= last - first) continue;
      for (int i; (i = first + next.fetch_add(1, std::memory_order_relaxed)) < last;) piece(i);
    }
  }

 private:
  static constexpr int kSpins = 4000;

  // How many pieces of a thread's share are taken, this time and the next.
  struct alignas(64) Taken {
    std::atomic<int> next[2] = {0, 0};
    int turn = 0;  // the same on all threads
  };

  const pid_t process_;
  std::function<void(int)> job_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Taken[]> taken_;
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
