// Aligned memory that grows and is never copied.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace treadle {

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
    // Weights are read in long streams: large pages spare the address translation.
    size_t step = count * sizeof(T) >= (size_t(1) << 21) ? size_t(1) << 21 : 64;
    size_t bytes = (count * sizeof(T) + step - 1) / step * step;
    data_ = static_cast<T*>(std::aligned_alloc(step, bytes));
    count_ = data_ ? count : 0;
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (step > 64) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace treadle
