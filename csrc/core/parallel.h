// A team of threads on the OpenMP runtime that torch runs on, its barrier, and how work is split.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vec.h"

namespace pykernels {

constexpr int64_t kCacheLine = 64;

PK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts` of [0, n), in whole blocks, sizes one block apart at the most.
PK_INLINE Range split(int64_t n, int64_t block, int64_t parts, int64_t index) {
  const int64_t blocks = ceil_div(n, block);
  const auto start = [&](int64_t i) { return std::min(n, blocks * i / parts * block); };
  return {start(index), start(index + 1)};
}

// Meets in about 0.1 us when every thread has a core. It spins: recurrences wait here once a step.
class Barrier {
 public:
  // Longer than the threads of an idle machine are apart, shorter than the time for which a thread
  // waits until it gets a core that another has.
  static constexpr std::chrono::nanoseconds kLong = std::chrono::microseconds(200);

  // Returns once all threads are here. If at meetings time and again some thread waits for longer
  // than `patience`, another has no core: from the next meeting on the team is crowded.
  void wait(int threads, std::chrono::nanoseconds patience = kLong) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    const auto met = [&] { return phase_.load(std::memory_order_acquire) != phase; };
    for (int spins = 0; spins < kSpins; ++spins) {
      if (met()) return;
      spin_pause();
    }
    const auto start = std::chrono::steady_clock::now();
    while (!met()) std::this_thread::yield();  // more threads than cores: let the late one run
    if (std::chrono::steady_clock::now() - start > patience &&
        late_at_.exchange(phase, std::memory_order_relaxed) != phase &&  // one for all that wait
        late_.fetch_add(1, std::memory_order_relaxed) + 1 == kLate)
      crowded_from_.store(phase + 2, std::memory_order_relaxed);
  }

  // Whether threads lack cores: the same answer in every thread between two meetings.
  bool crowded() const {
    return phase_.load(std::memory_order_relaxed) >= crowded_from_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr int kSpins = 512;
  static constexpr int kLate = 4;  // a thread loses its core now and then on an idle machine too
  alignas(kCacheLine) std::atomic<int> arrived_{0};
  alignas(kCacheLine) std::atomic<uint32_t> phase_{0};
  alignas(kCacheLine) std::atomic<int> late_{0};
  std::atomic<uint32_t> late_at_{~uint32_t{0}}, crowded_from_{~uint32_t{0}};
};

// How far one thread has come, for another that goes where it has been.
class Progress {
 public:
  void reach(int64_t step) { done_.store(step, std::memory_order_release); }
  void await(int64_t step) const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < step; ++spins) {
      if (spins < kSpins) spin_pause();
      else std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 512;
  alignas(kCacheLine) std::atomic<int64_t> done_{0};
};

// One thread's view of its team.
struct Team {
  int rank, size;
  Barrier* barrier;

  void wait() const {
    if (size > 1) barrier->wait(size);
  }
  Range share(int64_t n, int64_t block = 1) const { return split(n, block, size, rank); }
};

// Whether this thread has come out of a fork alone. libgomp would have it wait for ever for the
// team that stayed with the parent; threads that the child starts have teams of their own.
inline thread_local bool forked = false;

// Runs work(Team) on `threads` threads, fewer if the runtime has fewer; with denormals flushed.
// What work throws would end the process: allocate before, not inside.
template <class Work>
void parallel(int threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1 && !forked) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
      const FlushDenormals flush;
      work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
    }
    return;
  }
#endif
  (void)threads;
  const FlushDenormals flush;
  work(Team{0, 1, nullptr});
}

// Memory that calls have given back, kept for the next calls of the same thread: fresh memory costs
// a page fault every 4 KB, which for a small op is most of its time.
class FreeBlocks {
 public:
  struct Block {
    void* data;
    size_t size;
    size_t asked;  // no more than the size
  };

  Block take(size_t size) {
    taken_ += size;
    peak_ = std::max(peak_, taken_);
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i].size >= size && blocks_[i].size <= 2 * size &&
          (best == blocks_.size() || blocks_[i].size < blocks_[best].size))
        best = i;
    if (best == blocks_.size()) return {::operator new(size, kAlign), size, size};
    Block found = blocks_[best];
    found.asked = size;
    blocks_[best] = blocks_.back();
    blocks_.pop_back();
    held_ -= found.size;
    return found;
  }

  void give(Block block) {
    if (!block.data) return;
    taken_ -= block.asked;
    if (held_ + block.size > kMost) return ::operator delete(block.data, kAlign);
    held_ += block.size;
    blocks_.push_back(block);
  }

  ~FreeBlocks() {
    for (const Block& block : blocks_) ::operator delete(block.data, kAlign);
  }

  // The most bytes that calls of this thread have had at once, since this was asked last.
  size_t peak() { return std::exchange(peak_, taken_); }

  static FreeBlocks& of_this_thread() {
    static thread_local FreeBlocks blocks;
    return blocks;
  }

 private:
  static constexpr std::align_val_t kAlign{kCacheLine};
  static constexpr size_t kMost = size_t{32} << 20;  // bytes kept by one thread
  std::vector<Block> blocks_;
  size_t held_ = 0, taken_ = 0, peak_ = 0;
};

// An aligned buffer for one call, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : block_(count > 0 ? FreeBlocks::of_this_thread().take(count * sizeof(T))
                         : FreeBlocks::Block{nullptr, 0, 0}) {}
  ~Scratch() { FreeBlocks::of_this_thread().give(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  const FreeBlocks::Block block_;
};

}  // namespace pykernels
