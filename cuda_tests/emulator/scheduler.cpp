#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "context.h"
#include "cuda_runtime.h"

// Present where the program is built with AddressSanitizer, which has to know of every change of stacks.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // AddressSanitizer's frames are large
constexpr int kWarp = 32;

enum class State { ready, at_barrier, in_warp_op, finished };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Context context;
  void* sanitizer_stack = nullptr;
  State state = State::ready;
  WarpOp op = WarpOp::sync;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;
};

class Block {
 public:
  void run(int threads, int shared_bytes, const std::function<void()>& kernel, std::mt19937& random) {
    ++serial_, threads_ = threads, shared_bytes_ = shared_bytes, kernel_ = &kernel;
    block_epoch_ = 0, waiting_ = finished_ = 0;
    warp_epochs_.assign((threads + kWarp - 1) / kWarp, 0);
    while (static_cast<int>(fibers_.size()) < threads) create();
    std::vector<int> ready(threads);
    std::iota(ready.begin(), ready.end(), 0);
    for (int t : ready) fibers_[t]->state = State::ready;
    while (!ready.empty()) {
      std::swap(ready[random() % ready.size()], ready.back());
      const int next = ready.back();
      ready.pop_back();
      resume(next);
      release(next, ready);
    }
    for (int t = 0; t < threads; ++t) {
      if (fibers_[t]->state != State::finished)
        fail("thread %d waits forever %s", t,
             fibers_[t]->state == State::at_barrier ? "at __syncthreads" : "in a warp operation");
    }
  }

  // Leaves the running fiber for the scheduler, until it is ready again.
  void wait(State state) {
    Fiber& fiber = *fibers_[running_];
    fiber.state = state;
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(&fiber.sanitizer_stack, scheduler_stack_, scheduler_stack_bytes_);
    change(fiber.context, scheduler_);
    arrive(fiber.sanitizer_stack);
  }

  Fiber& running() { return *fibers_[running_]; }
  Moment now() const {
    return {running_, running_ / kWarp, block_epoch_, warp_epochs_[static_cast<size_t>(running_ / kWarp)]};
  }
  bool is_running() const { return running_ >= 0; }
  uint64_t serial() const { return serial_; }
  int shared_bytes() const { return shared_bytes_; }

 private:
  static void enter();

  // A new fiber, up to the point where it waits for its first kernel.
  void create() {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    make(fiber.context, fiber.stack.get(), kStackBytes, &Block::enter);
    resume(static_cast<int>(fibers_.size()) - 1);
  }

  // Runs a fiber until it waits or ends.
  void resume(int thread) {
    running_ = thread;
    threadIdx.x = static_cast<unsigned>(thread);
    Fiber& fiber = *fibers_[thread];
    void* mine = nullptr;
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&mine, fiber.stack.get(), kStackBytes);
    change(scheduler_, fiber.context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
    running_ = -1;
  }

  void arrive(void* kept) {
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(kept, &scheduler_stack_, &scheduler_stack_bytes_);
  }

  // What the fiber that just stopped makes ready.
  void release(int thread, std::vector<int>& ready) {
    if (fibers_[thread]->state == State::in_warp_op) release_warp(thread, ready);
    if (fibers_[thread]->state == State::finished) check_left_behind(thread);
    waiting_ += fibers_[thread]->state == State::at_barrier;
    finished_ += fibers_[thread]->state == State::finished;
    if (waiting_ == 0 || waiting_ + finished_ < threads_) return;
    ++block_epoch_, waiting_ = 0;
    for (int t = 0; t < threads_; ++t)
      if (fibers_[t]->state == State::at_barrier) fibers_[t]->state = State::ready, ready.push_back(t);
  }

  void release_warp(int thread, std::vector<int>& ready) {
    const Fiber& last = *fibers_[thread];
    const int first = thread / kWarp * kWarp, lanes = std::min(kWarp, threads_ - first);
    if (!(last.mask >> (thread - first) & 1)) fail("thread %d is not in the mask of its own warp operation", thread);
    unsigned votes = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(last.mask >> lane & 1)) continue;
      const Fiber& fiber = *fibers_[first + lane];
      if (fiber.state == State::finished) fail("thread %d waits for lane %d, which has ended", thread, lane);
      if (fiber.state != State::in_warp_op) return;
      if (fiber.op != last.op || fiber.mask != last.mask)
        fail("threads %d and %d meet in different warp operations or masks", thread, first + lane);
      votes |= static_cast<unsigned>(fiber.value != 0) << lane;
    }
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(last.mask >> lane & 1)) continue;
      Fiber& fiber = *fibers_[first + lane];
      fiber.result = votes;
      if (fiber.op == WarpOp::shuffle) {
        if (!(last.mask >> fiber.source & 1) || fiber.source >= lanes)
          fail("thread %d reads lane %d, which is not in the mask", first + lane, fiber.source);
        fiber.result = fibers_[first + fiber.source]->value;
      }
    }
    for (int lane = 0; lane < lanes; ++lane)
      if (last.mask >> lane & 1) fibers_[first + lane]->state = State::ready, ready.push_back(first + lane);
    if (last.op == WarpOp::sync) ++warp_epochs_[static_cast<size_t>(thread / kWarp)];
  }

  void check_left_behind(int thread) {
    const int first = thread / kWarp * kWarp;
    for (int t = first; t < std::min(first + kWarp, threads_); ++t) {
      if (fibers_[t]->state == State::in_warp_op && fibers_[t]->mask >> (thread - first) & 1)
        fail("thread %d waits for lane %d, which has ended", t, thread - first);
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<uint64_t> warp_epochs_;
  Context scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0, shared_bytes_ = 0, waiting_ = 0, finished_ = 0;
  int running_ = -1;
  uint64_t serial_ = 0, block_epoch_ = 0;
};

Block block;

unsigned seed() {
  static const unsigned value = [] {
    const char* text = std::getenv("HFLOW_EMULATOR_SEED");
    return text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 1u;
  }();
  return value;
}

void Block::enter() {
  block.arrive(nullptr);
  for (;;) {
    block.wait(State::finished);
    (*block.kernel_)();
  }
}

}  // namespace

void fail(const char* format, ...) {
  std::printf("emulator: ");
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  if (block.is_running()) std::printf(" (block %u, thread %u)", blockIdx.x, threadIdx.x);
  std::printf("; HFLOW_EMULATOR_SEED=%u\n", seed());
  std::fflush(stdout);
  std::_Exit(kFault);
}

void run_grid(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (blocks < 1 || blocks > INT32_MAX) fail("a grid of %lld blocks", static_cast<long long>(blocks));
  if (threads < 1 || threads > 1024) fail("a block of %d threads", threads);
  if (shared_bytes < 0 || shared_bytes > 99 << 10)  // what every target offers: sm_86 has 99 KiB
    fail("a block with %d bytes of dynamic shared memory", shared_bytes);
  static std::mt19937 random(seed());
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (unsigned b : order) {
    blockIdx = {b, 0, 0};
    block.run(threads, shared_bytes, kernel, random);
  }
}

Moment now() { return block.now(); }
uint64_t block_serial() { return block.serial(); }
int dynamic_shared_bytes() { return block.shared_bytes(); }

void sync_threads() { block.wait(State::at_barrier); }

uint64_t exchange(WarpOp op, unsigned mask, uint64_t value, int source) {
  if (op == WarpOp::sync && mask != 0xffffffffu) fail("__syncwarp of a part of a warp: not supported here");
  Fiber& fiber = block.running();
  fiber.op = op, fiber.mask = mask, fiber.value = value, fiber.source = source;
  block.wait(State::in_warp_op);
  return fiber.result;
}

}  // namespace emulator
