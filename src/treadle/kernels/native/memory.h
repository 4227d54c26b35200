// Aligned memory that grows and is never copied.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace treadle {

constexpr size_t kLarge = size_t(1) << 21;

// Large pages spare the address translation. Memory that is not used yet takes none of them.
inline void in_large_pages(void* from, size_t bytes) {
#if defined(__linux__)
  uintptr_t first = (uintptr_t(from) + kLarge - 1) / kLarge * kLarge;
  uintptr_t last = (uintptr_t(from) + bytes) / kLarge * kLarge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { reserve(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // Room for `count`; what was there is lost where it has to grow.
  void reserve(size_t count) {
    if (count <= count_) return;
    std::free(data_);
    size_t step = count * sizeof(T) >= kLarge ? kLarge : 64;
    size_t bytes = (count * sizeof(T) + step - 1) / step * step;
    data_ = static_cast<T*>(std::aligned_alloc(step, bytes));
    count_ = data_ ? count : 0;
    if (!data_) throw std::bad_alloc();
    if (step == kLarge) in_large_pages(data_, bytes);
  }

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// One piece of memory for many matrices, most of which are smaller than a large page.
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes), memory_(bytes) {}

  // `bytes`, at 64 aligned; from any thread.
  uint8_t* take(size_t bytes) {
    size_t at = used_.fetch_add((bytes + 63) / 64 * 64);
    if (at + bytes > bytes_) throw std::bad_alloc();
    return memory_.data() + at;
  }

 private:
  const size_t bytes_;
  Buffer<uint8_t> memory_;
  std::atomic<size_t> used_{0};
};

}  // namespace treadle
