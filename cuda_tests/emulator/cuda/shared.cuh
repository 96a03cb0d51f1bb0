// Shared memory in the emulator: stands in for csrc/cuda/shared.cuh. Every access is checked: inside its array, not
// before a first write in this block, and not in a race with another thread of the block. Two accesses of one element by
// different threads, one of them a write, must have a __syncthreads between them, or within a warp a __syncwarp: shuffles
// and votes do not order memory.
#pragma once

#include <cuda_runtime.h>

#include <vector>

namespace hflow::cuda {

namespace detail {

// Who last wrote an element, and who has read it since the last barrier.
class Shadow {
 public:
  void write(int index) {
    const emulator::Moment now = emulator::now();
    if (written_ && conflicts(last_write_, false, false, now))
      emulator::fail("a race: shared element %d is written, and by thread %d before it, without a barrier", index,
                     last_write_.thread);
    if (read_ && conflicts(last_read_, many_warps_, many_lanes_, now))
      emulator::fail("a race: shared element %d is written, and read by thread %d before it, without a barrier", index,
                     last_read_.thread);
    written_ = true, last_write_ = now;
  }

  void read(int index) {
    const emulator::Moment now = emulator::now();
    if (!written_) emulator::fail("shared element %d is read before anything was written to it", index);
    if (conflicts(last_write_, false, false, now))
      emulator::fail("a race: shared element %d is read, and written by thread %d before it, without a barrier", index,
                     last_write_.thread);
    if (read_ && last_read_.block_epoch == now.block_epoch) {
      many_warps_ |= last_read_.warp != now.warp;
      const bool same_lanes = last_read_.warp == now.warp && last_read_.warp_epoch == now.warp_epoch;
      many_lanes_ = same_lanes && (many_lanes_ || last_read_.thread != now.thread);
    } else {
      many_warps_ = many_lanes_ = false;
    }
    read_ = true, last_read_ = now;
  }

 private:
  // Whether an access of `then` (or of others of its warp, or of other warps) and one now have no barrier between them.
  static bool conflicts(const emulator::Moment& then, bool many_warps, bool many_lanes, const emulator::Moment& now) {
    if (then.block_epoch != now.block_epoch) return false;
    if (many_warps || then.warp != now.warp) return true;
    return then.warp_epoch == now.warp_epoch && (many_lanes || then.thread != now.thread);
  }

  emulator::Moment last_write_{}, last_read_{};
  bool written_ = false, read_ = false, many_warps_ = false, many_lanes_ = false;
};

}  // namespace detail

template <class T>
class SharedSpan {
 public:
  class Reference {
   public:
    Reference(SharedSpan span, int64_t index) : span_(span), index_(index) {}
    operator T() const { return span_.get(index_); }
    T operator=(T value) const { return span_.set(index_, value), value; }
    T operator=(const Reference& other) const { return *this = static_cast<T>(other); }
    T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
    T operator-=(T value) const { return *this = static_cast<T>(*this) - value; }
    T operator*=(T value) const { return *this = static_cast<T>(*this) * value; }

   private:
    SharedSpan span_;
    int64_t index_;
  };

  SharedSpan(T* values, detail::Shadow* shadows, int64_t size) : values_(values), shadows_(shadows), size_(size) {}
  Reference operator[](int64_t i) const { return Reference(*this, i); }

  template <int V>
  void load(int64_t i, T (&to)[V]) const {
    check_alignment<V>(i);
    for (int k = 0; k < V; ++k) to[k] = get(i + k);
  }
  template <int V>
  void store(int64_t i, const T (&from)[V]) const {
    check_alignment<V>(i);
    for (int k = 0; k < V; ++k) set(i + k, from[k]);
  }

  T get(int64_t i) const {
    check(i);
    shadows_[i].read(static_cast<int>(i));
    return values_[i];
  }
  void set(int64_t i, T value) const {
    check(i);
    shadows_[i].write(static_cast<int>(i));
    values_[i] = value;
  }

 private:
  void check(int64_t i) const {
    if (i < 0 || i >= size_)
      emulator::fail("shared element %lld of an array of %lld", static_cast<long long>(i),
                     static_cast<long long>(size_));
  }
  template <int V>
  void check_alignment(int64_t i) const {
    if (V * sizeof(T) == 16 && i * sizeof(T) % 16 != 0)
      emulator::fail("16 bytes of shared memory from element %lld on, which is not aligned", static_cast<long long>(i));
  }

  T* values_;
  detail::Shadow* shadows_;
  int64_t size_;
};

namespace detail {
// The memory behind one array, forgotten from block to block.
template <class T>
class SharedMemory {
 public:
  SharedSpan<T> span(int64_t size) {
    if (serial_ != emulator::block_serial()) {
      serial_ = emulator::block_serial();
      values_.assign(static_cast<size_t>(size), T());
      shadows_.assign(static_cast<size_t>(size), Shadow());
    }
    return SharedSpan<T>(values_.data(), shadows_.data(), size);
  }

 private:
  uint64_t serial_ = 0;
  std::vector<T> values_;
  std::vector<Shadow> shadows_;
};
}  // namespace detail

template <class T, int N>
class SharedArray {
 public:
  typename SharedSpan<T>::Reference operator[](int64_t i) { return span()[i]; }
  template <int V>
  void load(int64_t i, T (&to)[V]) {
    span().load(i, to);
  }
  template <int V>
  void store(int64_t i, const T (&from)[V]) {
    span().store(i, from);
  }
  SharedSpan<T> span() { return memory_.span(N); }

 private:
  detail::SharedMemory<T> memory_;
};

template <class T>
using DynamicShared = SharedSpan<T>;

template <class T>
DynamicShared<T> dynamic_shared() {
  static detail::SharedMemory<T> memory;
  return memory.span(emulator::dynamic_shared_bytes() / static_cast<int64_t>(sizeof(T)));
}

}  // namespace hflow::cuda
