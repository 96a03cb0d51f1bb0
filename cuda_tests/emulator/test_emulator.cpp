// The emulator itself: what kernels rely on works, and every rule that a kernel can break is noticed.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <limits>

#include "check.h"
#include "cuda/device.cuh"
#include "device.h"

namespace {

using namespace hflow::cuda;

// ---- Kernels that keep the rules ----

void sums(const float* x, float* total, int n) {
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) sum += x[i];
  sum = block_sum(sum);
  if (threadIdx.x == 7) total[blockIdx.x] = sum;
}

// Reverses a block's values through fixed and dynamic shared memory, in one-element and 16-byte accesses.
void reverse(const float* x, float* y) {
  __shared__ SharedArray<float, kThreads> fixed;
  const DynamicShared<float> dynamic = dynamic_shared<float>();
  const int t = static_cast<int>(threadIdx.x);
  fixed[t] = x[t];
  __syncthreads();
  if (t < kThreads / 4) {
    float four[4];
    fixed.load(4 * t, four);
    dynamic.store(4 * t, four);
  }
  __syncthreads();
  y[kThreads - 1 - t] = dynamic[t];
}

void lanes(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned odd = 0xaaaaaaaau;
  int* mine = out + 8 * threadIdx.x;
  mine[0] = __shfl_sync(kWholeWarp, lane, 5);
  mine[1] = __shfl_down_sync(kWholeWarp, lane, 3);
  mine[2] = __shfl_up_sync(kWholeWarp, lane, 1, 8);
  mine[3] = __shfl_xor_sync(kWholeWarp, lane, 16);
  mine[4] = static_cast<int>(__ballot_sync(kWholeWarp, lane < 3));
  mine[5] = __any_sync(kWholeWarp, lane == 31) + 2 * __all_sync(kWholeWarp, lane < 31);
  mine[6] = lane % 2 ? __shfl_sync(odd, lane, 7) : -1;  // a part of the warp
  mine[7] = static_cast<int>(threadIdx.x);
}

// Within a warp, __syncwarp is barrier enough.
void neighbours(int* out) {
  __shared__ SharedArray<int, 64> values;
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  __syncwarp();
  out[t] = values[t ^ 1];
}

// ---- Kernels that break one ----

void no_barrier(int* out) {
  __shared__ SharedArray<int, 64> values;
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  out[t] = values[63 - t];
}

// Every thread reads its neighbour's value, then replaces its own.
void no_barrier_before_writing(int* out) {
  __shared__ SharedArray<int, 64> values;
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  __syncthreads();
  out[t] = values[(t + 1) % 64];
  values[t] = -t;
}

void shuffle_for_a_barrier(int* out) {
  __shared__ SharedArray<int, 64> values;
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  __shfl_sync(kWholeWarp, 0, 0);
  out[t] = values[t ^ 1];
}

void warp_barrier_for_a_block(int* out) {
  __shared__ SharedArray<int, 64> values;
  const int t = static_cast<int>(threadIdx.x);
  values[t] = t;
  __syncwarp();
  out[t] = values[63 - t];
}

void uninitialised(int* out) {
  __shared__ SharedArray<int, 64> values;
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];  // what another block left there
}

void outside_shared(int* out) {
  __shared__ SharedArray<int, 63> values;
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[0];
}

void outside_dynamic(int* out) {
  const DynamicShared<int> values = dynamic_shared<int>();
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

void misaligned_shared(int* out) {
  __shared__ SharedArray<int, 64> values;
  values[threadIdx.x] = 1;
  __syncthreads();
  int four[4];
  if (threadIdx.x < 60) values.load(threadIdx.x, four), out[threadIdx.x] = four[3];
}

void divergent_shuffle(int* out) {
  if (threadIdx.x % 2) return;
  out[threadIdx.x] = __shfl_sync(kWholeWarp, 1, 0);
}

void barrier_for_some(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp(), __shfl_sync(kWholeWarp, 1, 0);
  if (threadIdx.x == 0) __shfl_sync(kWholeWarp, 1, 0);
  out[threadIdx.x] = 1;
}

void outside_memory(int* out) { out[threadIdx.x + 200] = 1; }

void misaligned_memory(int* out) {
  int values[4];
  load(out + 1, 0, 4, values);
  out[0] = values[0];
}

// Runs `work` in a process of its own and expects it to end with a fault, or in a sanitizer's report.
void expect_fault(const char* name, const std::function<void()>& work) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stdout);
    std::freopen("/dev/null", "w", stderr);
    work();
    std::_Exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
    ++test::failures;
    std::printf("FAILED: the emulator did not notice %s\n", name);
  }
}

void test_rules() {
  const test::Buffer<int> out(64);
  const auto expect = [&](const char* name, void (*kernel)(int*), int64_t blocks = 1, int shared_bytes = 0) {
    expect_fault(name, [&] { launch(kernel, {blocks, 64, shared_bytes}, cudaStream_t{}, out.data()); });
  };
  expect("a missing __syncthreads", no_barrier);
  expect("a missing __syncthreads between reading and writing", no_barrier_before_writing);
  expect("a shuffle in place of __syncwarp", shuffle_for_a_barrier);
  expect("__syncwarp in place of __syncthreads", warp_barrier_for_a_block);
  expect("a read of uninitialised shared memory", uninitialised, 2);
  expect("an access outside a shared array", outside_shared);
  expect("an access outside dynamic shared memory", outside_dynamic, 1, 63 * sizeof(int));
  expect("a misaligned vector in shared memory", misaligned_shared);
  expect("a shuffle with lanes that have ended", divergent_shuffle);
  expect("a barrier that some threads never reach", barrier_for_some);
  expect("a write outside device memory", outside_memory);
  expect("a misaligned vector in device memory", misaligned_memory);
  expect("an empty grid", neighbours, 0);
}

void test_block_sum() {
  std::vector<float> values(1000);
  for (int i = 0; i < 1000; ++i) values[i] = static_cast<float>(i);
  const test::Buffer<float> x(values), total(3);
  launch(sums, 3, cudaStream_t{}, x.data(), total.data(), 1000);
  for (float sum : total.read()) test::expect_close("block_sum", sum, 499500, 0);
}

void test_shared() {
  std::vector<float> values(kThreads);
  for (int i = 0; i < kThreads; ++i) values[i] = static_cast<float>(i);
  const test::Buffer<float> x(values), y(kThreads);
  launch(reverse, {1, kThreads, kThreads * sizeof(float)}, cudaStream_t{}, x.data(), y.data());
  const std::vector<float> got = y.read();
  for (int i = 0; i < kThreads; ++i) test::expect_close("reverse", got[i], kThreads - 1 - i, 0);
}

void test_lanes() {
  const test::Buffer<int> out(8 * 64);
  launch(lanes, {1, 64}, cudaStream_t{}, out.data());
  const std::vector<int> got = out.read();
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    const int expected[8] = {5, lane + 3 < 32 ? lane + 3 : lane, lane % 8 ? lane - 1 : lane, lane ^ 16, 7, 1,
                             lane % 2 ? 7 : -1, t};
    for (int i = 0; i < 8; ++i) test::expect_close("lane operation", got[8 * t + i], expected[i], 0);
  }
  const test::Buffer<int> swapped(64);
  launch(neighbours, {1, 64}, cudaStream_t{}, swapped.data());
  const std::vector<int> pairs = swapped.read();
  for (int t = 0; t < 64; ++t) test::expect_close("neighbours", pairs[t], t ^ 1, 0);
}

void test_half_types() {
  const float inf = std::numeric_limits<float>::infinity();
  const auto half = [](float x) { return __half2float(__float2half_rn(x)); };
  const auto bfloat = [](float x) { return __bfloat162float(__float2bfloat16_rn(x)); };
  const struct {
    float value, half, bfloat;
  } cases[] = {
      {0, 0, 0}, {1, 1, 1}, {-2.5f, -2.5f, -2.5f}, {inf, inf, inf}, {-inf, -inf, -inf}, {NAN, NAN, NAN},
      {1 + 0x1p-11f, 1, 1},                                 // half way: to even, down
      {1 + 3 * 0x1p-11f, 1 + 0x1p-9f, 1},                   // half way: to even, up
      {1 + 0x1p-8f, 1 + 0x1p-8f, 1},                        // half way in bfloat16
      {65504, 65504, 65536}, {65520, inf, 65536},           // the largest half, and half a unit beyond it
      {0x1p-24f, 0x1p-24f, 0x1p-24f}, {0x1p-26f, 0, 0x1p-26f},  // subnormal halves
      {0x1.fffp-15f, 0x1p-14f, 0x1p-14f},                   // a subnormal that rounds up to a normal one
      {3.39e38f, inf, 0x1.fep127f}, {3.4028235e38f, inf, inf},
  };
  for (const auto& c : cases) {
    test::expect_close("half of " + std::to_string(c.value), half(c.value), c.half, 0);
    test::expect_close("bfloat16 of " + std::to_string(c.value), bfloat(c.value), c.bfloat, 0);
  }
}

}  // namespace

int main() {
  test_block_sum();
  test_shared();
  test_lanes();
  test_half_types();
  test_rules();
  return test::report();
}
