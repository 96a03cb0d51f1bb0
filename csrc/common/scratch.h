// Working memory that threads keep: fresh pages from the system would cost more than a small kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace hflow {

// Uninitialised floats on a cache line's border. What a thread gives back it finds again, up to kKept.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : buffer_(take(floats)) {}
  ~Scratch() { give_back(std::move(buffer_)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* get() const { return buffer_.data.get(); }

 private:
  static constexpr int64_t kKept = int64_t{1} << 25;  // 128 MiB
  static constexpr std::align_val_t kLine{64};

  struct Free {
    void operator()(float* data) const { ::operator delete(data, kLine); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t floats;
  };

  static std::vector<Buffer>& idle() {
    thread_local std::vector<Buffer> buffers;
    return buffers;
  }

  // The smallest that is large enough.
  static Buffer take(int64_t floats) {
    std::vector<Buffer>& buffers = idle();
    auto best = buffers.end();
    for (auto it = buffers.begin(); it != buffers.end(); ++it)
      if (it->floats >= floats && (best == buffers.end() || it->floats < best->floats)) best = it;
    if (best == buffers.end()) {
      void* data = ::operator new(floats * sizeof(float), kLine);
      return {std::unique_ptr<float, Free>(static_cast<float*>(data)), floats};
    }
    Buffer buffer = std::move(*best);
    buffers.erase(best);
    return buffer;
  }

  // Drops the smallest where there would be too much: they are the soonest replaced.
  static void give_back(Buffer buffer) {
    std::vector<Buffer>& buffers = idle();
    buffers.push_back(std::move(buffer));
    std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.floats > b.floats; });
    int64_t total = 0;
    const auto excess = std::find_if(buffers.begin(), buffers.end(),
                                     [&](const Buffer& kept) { return (total += kept.floats) > kKept; });
    buffers.erase(excess, buffers.end());
  }

  Buffer buffer_;
};

}  // namespace hflow
