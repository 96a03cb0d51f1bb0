// Runs a kernel's blocks one after another, each thread a fiber of its own, and holds what the fibers wait for.
//
// Fibers change only where a CUDA thread may wait: at __syncthreads, __syncwarp, shuffles, votes and its end. Which ready
// fiber goes on is drawn at random (HFLOW_EMULATOR_SEED, printed with every failure), and so is the order of blocks.
// A kernel that breaks a rule ends the process with kFault and a line that says how: what a GPU would do in silence.
#pragma once

#include <cstdint>
#include <functional>

namespace emulator {

constexpr int kFault = 3;  // exit status

// Where a thread is in the order that barriers make of a block's accesses.
struct Moment {
  int thread, warp;
  uint64_t block_epoch;  // __syncthreads passed by the block
  uint64_t warp_epoch;   // __syncwarp passed by the warp
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class WarpOp { sync, shuffle, vote };

void run_grid(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// For the running fiber.
Moment now();
uint64_t block_serial();  // of the running block: no two blocks of a process have the same
int dynamic_shared_bytes();
void sync_threads();
// Waits for the lanes of `mask`; returns what lane `source` brought (shuffle), or the lanes that brought non-zero (vote).
uint64_t exchange(WarpOp op, unsigned mask, uint64_t value, int source);

}  // namespace emulator
