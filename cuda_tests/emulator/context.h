// Changing between stacks. On x86-64 a few instructions; elsewhere the C library's ucontext, whose swapcontext asks the
// kernel for the signal mask and, under AddressSanitizer, clears the shadow of a whole stack, each time.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)

using Context = void*;  // the stack pointer, with the registers that a call preserves on the stack

extern "C" void emulator_change(Context* from, Context to);
asm(R"(
.text
.type emulator_change, @function
emulator_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_change, .-emulator_change
)");

// Leaves for `to`; returns when something leaves for `from`.
inline void change(Context& from, Context& to) { emulator_change(&from, to); }

// A context that begins with entry(), which must never return.
inline void make(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
  top -= 2;  // a call leaves the stack 8 bytes off a multiple of 16
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;  // the six registers: their values do not matter
}

#else

using Context = ucontext_t;

inline void change(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

}  // namespace emulator
