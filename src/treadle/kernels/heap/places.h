// Where blocks of memory begin: best fit, the lowest place among equals, free neighbours joined.
//
// The places follow from the order of requests alone; `treadle/planning/heap.py` has the same rules,
// to foretell what a run will take.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace treadle {

class Places {
 public:
  static constexpr size_t kPage = 4096, kNowhere = ~size_t{0};

  explicit Places(size_t room) : room_(room) {}

  // Where a block begins; `kNowhere`, and nothing is changed, if there is no room for it.
  size_t ask(size_t bytes) {
    if (bytes > room_) return kNowhere;
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    size_t place = end_;
    if (const auto fit = by_size_.lower_bound({size, 0}); fit != by_size_.end()) {
      const auto [found, at] = *fit;
      place = at;
      take(at, found);
      if (found > size) put(at + size, found - size);
    } else {
      // What is free at the end becomes the beginning of the block.
      size_t last = 0;
      if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second == end_) {
        std::tie(place, last) = *free_.rbegin();
      }
      if (place + size > room_) return kNowhere;
      if (last > 0) take(place, last);
      end_ = place + size;
    }
    used_.emplace(place, size);
    return place;
  }

  void give_back(size_t place) {
    const auto block = used_.find(place);
    size_t size = block->second;
    used_.erase(block);
    const auto after = free_.lower_bound(place);
    if (after != free_.end() && after->first == place + size) {
      size += after->second;
      take(after->first, after->second);
    }
    auto before = free_.lower_bound(place);
    if (before != free_.begin() && (--before)->first + before->second == place) {
      const auto [at, found] = *before;
      take(at, found);
      place = at;
      size += found;
    }
    put(place, size);
  }

  // Free ranges: where each begins, and its size.
  const std::map<size_t, size_t>& unused() const { return free_; }

 private:
  void put(size_t at, size_t size) {
    free_.emplace(at, size);
    by_size_.emplace(size, at);
  }
  void take(size_t at, size_t size) {
    free_.erase(at);
    by_size_.erase({size, at});
  }

  const size_t room_;
  size_t end_ = 0;
  std::map<size_t, size_t> free_;
  std::set<std::pair<size_t, size_t>> by_size_;
  std::unordered_map<size_t, size_t> used_;
};

}  // namespace treadle
