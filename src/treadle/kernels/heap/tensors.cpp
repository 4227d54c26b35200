// torch's allocator on CPUs: tensors that are not small lie in a range of addresses of their own.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "places.h"

namespace {

constexpr size_t kAlignment = 64;

class TensorHeap final : public c10::Allocator {
 public:
  TensorHeap(char* begin, size_t room, size_t small)
      : begin_(begin), room_(room), small_(small), places_(room) {}

  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes >= small_) {
      data = large(bytes);
    } else if (bytes > 0 && posix_memalign(&data, kAlignment, bytes)) {
      throw std::bad_alloc();
    }
    if (data) c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  void release() {
    const std::lock_guard hold(lock_);
    for (const auto& [place, size] : places_.unused()) madvise(begin_ + place, size, MADV_DONTNEED);
  }

  static TensorHeap* only;

 private:
  void* large(size_t bytes) {
    const std::lock_guard hold(lock_);
    const size_t place = places_.ask(bytes);
    TORCH_CHECK(place != treadle::Places::kNowhere, "not enough memory for a tensor of ", bytes,
                " bytes: take a smaller model, or fewer tokens at a time");
    return begin_ + place;
  }

  static void give_back(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    const auto at = static_cast<char*>(data);
    if (at < only->begin_ || at >= only->begin_ + only->room_) return std::free(data);
    const std::lock_guard hold(only->lock_);
    only->places_.give_back(at - only->begin_);
  }

  char* const begin_;
  const size_t room_, small_;
  std::mutex lock_;
  treadle::Places places_;
};

TensorHeap* TensorHeap::only = nullptr;

}  // namespace

extern "C" {

// Tensors of `small` bytes and more in `room` bytes of addresses; 0 where there are not so many.
int treadle_tensor_heap(size_t room, size_t small) {
  if (TensorHeap::only) return 1;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* begin = mmap(nullptr, room, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (begin == MAP_FAILED) return 0;
  TensorHeap::only = new TensorHeap(static_cast<char*>(begin), room, small);
  c10::SetCPUAllocator(TensorHeap::only, 1);
  return 1;
}

void treadle_release_tensors() {
  if (TensorHeap::only) TensorHeap::only->release();
}
}
