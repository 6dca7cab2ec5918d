// The emulator's scheduler: runs one grid. See fibers.h.
#include "cuda_emulator.h"

namespace emu {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kGuard =
    64;  // bytes after dynamic shared memory that must keep their pattern

thread_local std::vector<char*> stacks;  // kept for the next launch

char* take_stack() {
  if (!stacks.empty()) {
    char* stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  const std::size_t bytes = config().stack_bytes;
  void* memory = mmap(nullptr,
                      bytes + kPage,
                      PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1,
                      0);
  if (memory == MAP_FAILED)
    throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);  // an overflow faults instead of corrupting a neighbour
  return static_cast<char*>(memory) + kPage;
}

EMU_NO_TSAN int pick(Block& block) {
  const int words = static_cast<int>(block.ready.size());
  switch (config().order) {
    case Order::kAscending:
      for (int i = 0; i < words; ++i) {
        if (block.ready[i])
          return i * 64 + std::countr_zero(block.ready[i]);
      }
      break;
    case Order::kDescending:
      for (int i = words - 1; i >= 0; --i) {
        if (block.ready[i])
          return i * 64 + 63 - std::countl_zero(block.ready[i]);
      }
      break;
    case Order::kRandom: {
      const int start = static_cast<int>(block.random() % static_cast<unsigned>(block.count));
      for (int k = 0; k <= words; ++k) {
        const int i = (start / 64 + k) % words;
        const std::uint64_t word =
            k == 0 ? block.ready[i] & (~0ull << (start & 63)) : block.ready[i];
        if (word)
          return i * 64 + std::countr_zero(word);
      }
      break;
    }
  }
  return -1;
}

EMU_NO_TSAN void start(Block& block,
                       dim3 dim,
                       std::size_t shared_bytes,
                       const std::function<void()>& body) {
  block.count = static_cast<int>(dim.x * dim.y * dim.z);
  block.body = &body;
  block.random.seed(config().seed * 7919 + 1);
  block.fibers.resize(block.count);
  block.warps.resize((block.count + 31) / 32);
  block.ready.assign((block.count + 63) / 64, 0);
  block.dynamic_bytes = shared_bytes;
  void* shared = nullptr;
#if EMU_ASAN
  const std::size_t room = shared_bytes ? shared_bytes : 1;  // ASan itself checks the end
#else
  const std::size_t room = shared_bytes + kGuard;
#endif
  if (posix_memalign(&shared, 128, room))
    throw std::bad_alloc();
  block.dynamic = static_cast<unsigned char*>(shared);
  block.main_tsan = tsan_current();
  for (int i = 0; i < block.count; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.index = i;
    fiber.lane = i & 31;
    fiber.warp = i >> 5;
    const unsigned n = static_cast<unsigned>(i);
    fiber.tid = {n % dim.x, n / dim.x % dim.y, n / (dim.x * dim.y)};
    fiber.stack = take_stack();
    asan_fresh(fiber.stack, config().stack_bytes);
    // rsp % 16 == 8 at a function's entry
    void** sp = reinterpret_cast<void**>(fiber.stack + config().stack_bytes) - 1;
    sp[0] = nullptr;
    *--sp = reinterpret_cast<void*>(&fiber_entry);
    for (int k = 0; k < 6; ++k)
      *--sp = nullptr;
    fiber.sp = sp;
    fiber.tsan = tsan_create();
  }
}

EMU_NO_TSAN void finish(Block& block) {
  for (auto& fiber : block.fibers) {
    tsan_destroy(fiber.tsan);
    stacks.push_back(fiber.stack);
  }
  std::free(block.dynamic);
  for (auto& array : block.arrays)
    std::free(array.data);
}

std::string deadlock(Block& block) {
  int barrier = 0;
  int warp = 0;
  for (auto& fiber : block.fibers) {
    barrier += fiber.state == State::kBarrier;
    warp += fiber.state == State::kWarp;
  }
  std::string text = "deadlock: " + std::to_string(block.count - block.alive) +
                     " threads exited, " + std::to_string(barrier) + " wait in __syncthreads";
  if (barrier)
    text += " (" + line_of(block.barrier_line) + ")";
  text += ", " + std::to_string(warp) + " in warp collectives";
  for (auto& w : block.warps) {
    if (w.arrived)
      return text + " (" + w.what + " at " + line_of(w.where) + ")";
  }
  return text;
}

EMU_NO_TSAN void run_block(Block& block, uint3 bid) {
  {
    Quiet quiet;
    block.bid = bid;
    block.alive = block.count;
    block.at_barrier = 0;
    std::memset(block.dynamic, config().poison, block.dynamic_bytes);
#if !EMU_ASAN
    std::memset(block.dynamic + block.dynamic_bytes, 0x5a, kGuard);
#endif
    for (auto& array : block.arrays)
      array.used = false;
    for (auto& warp : block.warps) {
      warp.alive = 0;
      warp.arrived = 0;
    }
    for (auto& fiber : block.fibers) {
      block.warps[fiber.warp].alive |= 1u << fiber.lane;
      set_ready(block, fiber.index);
    }
  }
  tsan_release(&block.start_tag);
  for (int i; block.error.empty() && (i = pick(block)) >= 0;) {
    block.ready[i >> 6] &= ~(1ull << (i & 63));
    to_fiber(block, block.fibers[i]);
  }
  tsan_acquire(&block.join_tag);
  if (block.error.empty() && block.alive)
    block.error = deadlock(block);
#if !EMU_ASAN
  for (std::size_t k = 0; k < kGuard && block.error.empty(); ++k) {
    if (block.dynamic[block.dynamic_bytes + k] != 0x5a)
      block.error = "dynamic shared memory was written past its end";
  }
#endif
}

}  // namespace

void launch(dim3 grid, dim3 dim, std::size_t shared_bytes, const std::function<void()>& body) {
  const std::uint64_t total = std::uint64_t(grid.x) * grid.y * grid.z;
  const std::uint64_t threads = std::uint64_t(dim.x) * dim.y * dim.z;
  if (threads == 0 || threads > 1024)
    throw std::runtime_error("emulator: a block has 1 to 1024 threads");
  if (total == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulator: bad grid size");
  if (shared_bytes > config().max_shared) {
    throw std::runtime_error("emulator: dynamic shared memory over the limit: " +
                             std::to_string(shared_bytes));
  }
  ++stats().launches;
  Block block;
  start(block, dim, shared_bytes, body);
  Fiber* outer = g_self;
  for (std::uint64_t i = 0; i < total && block.error.empty(); ++i) {
    const std::uint64_t j = config().blocks_descending ? total - 1 - i : i;
    run_block(block,
              {unsigned(j % grid.x), unsigned(j / grid.x % grid.y), unsigned(j / grid.x / grid.y)});
  }
  g_self = outer;
  const std::string error = block.error;
  finish(block);
  if (!error.empty())
    throw std::runtime_error("emulator: " + error);
}

}  // namespace emu
