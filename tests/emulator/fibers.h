// One fiber per CUDA thread: runs a grid block by block on the calling OS thread. For tests, not
// for speed.
//
// Fibers switch only where threads may wait for one another (barriers, warp collectives), in a
// chosen order; so a missing barrier shows as a wrong value under at least one order, and under
// TSan as a race (switches create no ordering there). x86-64 only. In blocks of 256 threads or more
// TSan reports nothing, so race tests use at most 128.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sanitizers.h"
#include "types.h"

namespace emu {

enum class Order : int { kAscending = 0, kDescending = 1, kRandom = 2 };

struct Config {
  Order order = Order::kAscending;  // which ready fiber runs next
  bool blocks_descending = false;   // order of the blocks of a grid
  bool cp_async_lazy =
      true;                // copy at the wait (the latest legal moment) or at issue (the earliest)
  std::uint64_t seed = 0;  // of the random order
  unsigned char poison =
      0xff;  // fills shared memory when a block starts: NaN in every floating format, -1 in int
  std::size_t max_shared = 227 * 1024;
  std::size_t stack_bytes = 64 * 1024;
};
struct Stats {
  std::uint64_t launches = 0, mma = 0, ldmatrix = 0, ldmatrix_wavefronts = 0, cp_async = 0;
};
inline Config& config() {
  static Config instance;
  return instance;
}
inline Stats& stats() {
  static Stats instance;
  return instance;
}

using Location = std::source_location;
inline std::string line_of(const Location& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

enum class State : std::uint8_t { kReady, kBarrier, kWarp, kDone };

struct AsyncCopy {
  void* to;
  const void* from;
  bool there;  // otherwise zeros are written
};
struct Block;
struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  uint3 tid{};
  int index = 0;
  int lane = 0;
  int warp = 0;
  State state = State::kDone;
  std::vector<AsyncCopy> open;
  std::vector<std::vector<AsyncCopy>> groups;
};
struct alignas(64) Tag {  // each has its own cell: TSan merges neighbours
  char cell = 0;
};
struct Warp {
  unsigned alive = 0;
  // The collective that lanes are arriving at.
  unsigned arrived = 0;
  const char* what = nullptr;
  Location where;
  void* slot[32];
};
struct SharedArray {
  const void* key;
  unsigned char* data;
  std::size_t bytes;
  bool used;
};
struct Block {
  uint3 bid{};
  int count = 0;
  int alive = 0;
  int at_barrier = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::uint64_t> ready;
  const std::function<void()>* body = nullptr;
  void* main_sp = nullptr;
  void* main_tsan = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  std::size_t main_stack_bytes = 0;
  unsigned char* dynamic = nullptr;
  std::size_t dynamic_bytes = 0;
  std::vector<SharedArray> arrays;
  std::string error;
  std::mt19937_64 random;
  Location barrier_line;
  unsigned barrier_generation = 0;
  Tag barrier_tag[2], start_tag, join_tag;
};

inline __attribute__((tls_model("initial-exec"))) thread_local Fiber* g_self = nullptr;
EMU_NO_TSAN inline Fiber& self() {
  return *g_self;
}

#if !defined(__x86_64__)
#error "switch_stacks is written for x86-64"
#endif
__attribute__((naked, noinline, unused)) static void switch_stacks(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

EMU_NO_TSAN inline void to_main(Fiber& fiber) {
  Block& block = *fiber.block;
  tsan_switch(block.main_tsan);
  asan_leave(&fiber.fake_stack, block.main_stack, block.main_stack_bytes);
  switch_stacks(&fiber.sp, block.main_sp);
  asan_arrive(fiber.fake_stack, &block.main_stack, &block.main_stack_bytes);
}
EMU_NO_TSAN inline void to_fiber(Block& block, Fiber& fiber) {
  g_self = &fiber;
  tsan_switch(fiber.tsan);
  asan_leave(&block.main_fake_stack, fiber.stack, config().stack_bytes);
  switch_stacks(&block.main_sp, fiber.sp);
  asan_arrive(block.main_fake_stack, nullptr, nullptr);
}
// Ends the block with an error; never returns.
[[noreturn]] EMU_NO_TSAN inline void fail(const std::string& message) {
  Fiber& fiber = self();
  Block& block = *fiber.block;
  if (block.error.empty()) {
    block.error = "block (" + std::to_string(block.bid.x) + "," + std::to_string(block.bid.y) +
                  "," + std::to_string(block.bid.z) + ") thread " + std::to_string(fiber.index) +
                  ": " + message;
  }
  for (;;)
    to_main(fiber);
}
EMU_NO_TSAN inline void set_ready(Block& block, int i) {
  block.fibers[i].state = State::kReady;
  block.ready[i >> 6] |= 1ull << (i & 63);
}
EMU_NO_TSAN inline void release_barrier(Block& block) {
  block.at_barrier = 0;
  ++block.barrier_generation;
  for (auto& fiber : block.fibers) {
    if (fiber.state == State::kBarrier)
      set_ready(block, fiber.index);
  }
}
EMU_NO_TSAN inline void fiber_entry() {
  asan_arrive(nullptr, &self().block->main_stack, &self().block->main_stack_bytes);
  for (;;) {
    Fiber& fiber = self();
    Block& block = *fiber.block;
    tsan_acquire(&block.start_tag);
    (*block.body)();
    tsan_release(&block.join_tag);
    {
      Quiet quiet;
      fiber.state = State::kDone;
      --block.alive;
      block.warps[fiber.warp].alive &= ~(1u << fiber.lane);
      fiber.open.clear();
      fiber.groups.clear();
      if (block.alive && block.at_barrier == block.alive)
        release_barrier(block);
    }
    to_main(fiber);
  }
}

EMU_NO_TSAN inline void block_barrier(const Location& where) {
  Fiber& fiber = self();
  Block& block = *fiber.block;
  if (block.at_barrier == 0) {
    block.barrier_line = where;
  } else if (block.barrier_line.line() != where.line()) {
    fail("__syncthreads divergence: " + line_of(where) + " meets " + line_of(block.barrier_line));
  }
  // Two alternating tags: arrivals at the next barrier must not be ordered before threads that
  // leave this one.
  Tag* tag = &block.barrier_tag[block.barrier_generation & 1];
  tsan_release(tag);
  {
    Quiet quiet;
    fiber.state = State::kBarrier;
    if (++block.at_barrier == block.alive)
      release_barrier(block);
  }
  to_main(fiber);
  tsan_acquire(tag);
}

// Every lane of the warp passes its slot; the last to arrive runs function(slots), then all continue.
// It orders no memory among the lanes.
template <class T, class F>
EMU_NO_TSAN inline void collective(
    const char* what, unsigned mask, T& slot, F&& function, const Location& where) {
  Fiber& fiber = self();
  Block& block = *fiber.block;
  Warp& warp = block.warps[fiber.warp];
  {
    Quiet quiet;
    if (mask != 0xffffffffu)
      fail(std::string(what) + " at " + line_of(where) + ": only whole warps are emulated");
    if (warp.alive != mask)
      fail(std::string(what) + " at " + line_of(where) + ": the mask names lanes that have exited");
    if (warp.arrived == 0) {
      warp.what = what;
      warp.where = where;
    }
    if (std::strcmp(warp.what, what) != 0) {
      fail(std::string("divergent warp collectives: ") + what + " at " + line_of(where) +
           " meets " + warp.what + " at " + line_of(warp.where));
    }
    warp.slot[fiber.lane] = &slot;
    warp.arrived |= 1u << fiber.lane;
    if (warp.arrived == mask) {
      void* slots[32];
      std::memcpy(slots, warp.slot, sizeof slots);
      warp.arrived = 0;
      function(slots);
      for (int lane = 0; lane < 32; ++lane)
        set_ready(block, fiber.index - fiber.lane + lane);
    } else {
      fiber.state = State::kWarp;
    }
  }
  to_main(fiber);
}

EMU_NO_TSAN inline unsigned char* dynamic_shared() {
  return self().block->dynamic;
}
EMU_NO_TSAN inline unsigned char* static_shared(const void* key, std::size_t bytes) {
  Quiet quiet;
  Block& block = *self().block;
  for (auto& array : block.arrays) {
    if (array.key != key)
      continue;
    if (!array.used)
      std::memset(array.data, config().poison, array.bytes);
    array.used = true;
    return array.data;
  }
  void* data = nullptr;
  if (posix_memalign(&data, 128, bytes))
    fail("no memory");
  std::memset(data, config().poison, bytes);
  block.arrays.push_back({key, static_cast<unsigned char*>(data), bytes, true});
  std::size_t total = block.dynamic_bytes;
  for (auto& array : block.arrays)
    total += array.bytes;
  if (total > config().max_shared)
    fail("shared memory over the limit: " + std::to_string(total) + " bytes");
  return static_cast<unsigned char*>(data);
}

void launch(dim3 grid, dim3 dim, std::size_t shared_bytes, const std::function<void()>& body);
template <class Kernel, class... Arguments>
std::function<void()> bind(Kernel kernel, Arguments... arguments) {
  return [=] {
    kernel(arguments...);
  };
}

}  // namespace emu
