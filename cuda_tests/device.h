// Device memory and the GPU's presence, for the tests of the torch-free kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace test {

constexpr int kSkip = 77;  // what CTest counts as skipped

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline void skip_without_gpu() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return;
  std::printf("skipped: no CUDA device\n");
  std::exit(kSkip);
}

// n values on the device, `offset` elements after an aligned address, with guards around them that must stay untouched.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n, size_t offset = 0)
      : size_(n), offset_(offset), bytes_((n + offset) * sizeof(T) + 2 * kGuard) {
    require(cudaMalloc(&memory_, bytes_), "cudaMalloc");
    require(cudaMemset(memory_, kFill, bytes_), "cudaMemset");
  }
  explicit Buffer(const std::vector<T>& values, size_t offset = 0) : Buffer(values.size(), offset) {
    if (size_ == 0) return;
    require(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
  }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return reinterpret_cast<T*>(memory_ + kGuard) + offset_; }

  // Waits for the device. Fails the test where something wrote outside the values.
  std::vector<T> read() const {
    std::vector<unsigned char> bytes(bytes_);
    require(cudaDeviceSynchronize(), "kernel");
    require(cudaMemcpy(bytes.data(), memory_, bytes_, cudaMemcpyDeviceToHost), "copy from the device");
    const size_t begin = kGuard + offset_ * sizeof(T), end = begin + size_ * sizeof(T);
    for (size_t i = 0; i < bytes_; ++i) {
      if ((i < begin || i >= end) && bytes[i] != kFill) {
        std::printf("a kernel wrote outside its output, %lld bytes from its start\n",
                    static_cast<long long>(i - begin));
        std::exit(1);
      }
    }
    const T* values = reinterpret_cast<const T*>(bytes.data() + begin);
    return std::vector<T>(values, values + size_);
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kFill = 0xFF;  // NaN in every dtype: an element that nobody wrote is noticed
  size_t size_, offset_, bytes_;
  unsigned char* memory_ = nullptr;
};

}  // namespace test
