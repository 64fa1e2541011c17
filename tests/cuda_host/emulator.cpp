// Threads of a block as coroutines, blocks one after the other.
#include "emulator.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "accesses.h"

namespace psf::cuda {
constexpr int64_t most_dynamic_bytes = 48 << 10;  // that every GPU has
// What kernels declare as `extern __shared__`. They call its initialiser, which does nothing.
thread_local double shared_memory[most_dynamic_bytes / 8];
void initialiser() asm("_ZTHN3psf4cuda13shared_memoryE");
void initialiser() {}
}  // namespace psf::cuda

namespace emulated {
namespace {

using psf::cuda::most_dynamic_bytes, psf::cuda::shared_memory;

constexpr int most_threads = 1024, stack_bytes = 128 << 10;
constexpr int nobody = -1;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool waits, finished;
};
struct Meeting {
  std::vector<int> arrived;
  int call = 0;
};

std::mt19937 random_numbers;
Accesses accesses;
ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Meeting> meetings;  // of the warps; the last is the block's
std::vector<uint64_t> words[2];
std::vector<int> turn, steps;   // of threads; barriers that a warp has passed
Grid current_grid;
int current = nobody, current_block = 0, epoch = 0;
void (*body)(const void*);
const void* context;
std::string error;

void stop(const std::string& what) {
  error = what;
  const int self = current;
  current = nobody;
  swapcontext(&fibers[self].context, &scheduler);
}

void access(const void* address, int bytes, bool write) {
  if (current == nobody) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), stack = reinterpret_cast<uintptr_t>(fibers[current].stack.get());
  if (at >= stack && at < stack + stack_bytes) return;
  const char* const problem = accesses.judge(at, bytes, write, {current, current_block, epoch, steps[current / 32]});
  if (problem) stop(problem);
}

void enter(int thread) {
  body(context);
  current = nobody;
  fibers[thread].finished = true;
}

// Runs the first warp that can go on, each thread of it once; whether there was one.
bool step(const std::vector<int>& warps, const std::vector<int>& order) {
  for (const int warp : warps) {
    bool moved = false;
    for (const int i : order) {
      if (i / 32 != warp || fibers[i].finished || fibers[i].waits) continue;
      moved = true;
      current = i;
      swapcontext(&scheduler, &fibers[i].context);
      current = nobody;
      if (!error.empty()) return true;
    }
    if (moved) return true;
  }
  return false;
}

void run_block() {
  const int threads = static_cast<int>(current_grid.threads.x);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&enter), 1, i);
    fiber.waits = fiber.finished = false;
  }
  meetings.assign(threads / 32 + 1, {});
  for (auto& x : words) x.assign(threads, 0);
  turn.assign(threads, 0);
  steps.assign(threads / 32, 0);
  epoch = 0;
  accesses.next_block();
  const Memory& shared = accesses.shared;
  std::memset(reinterpret_cast<void*>(shared.begin), 0xff, shared.end - shared.begin);

  std::vector<int> order(threads), warps(threads / 32);
  std::iota(order.begin(), order.end(), 0);
  std::iota(warps.begin(), warps.end(), 0);
  std::shuffle(warps.begin(), warps.end(), random_numbers);
  const auto finished = [](const Fiber& x) { return x.finished; };
  while (error.empty() && !std::all_of(fibers.begin(), fibers.begin() + threads, finished)) {
    std::shuffle(order.begin(), order.end(), random_numbers);
    if (random_numbers() % 64 == 0) std::shuffle(warps.begin(), warps.end(), random_numbers);
    if (!step(warps, order)) error = "threads wait for ever";
  }
}

// Shared memory: the thread-local variables of the library that holds this function. They are the kernels' __shared__ ones.
int find_shared(dl_phdr_info* info, size_t, void*) {
  const uintptr_t here = reinterpret_cast<uintptr_t>(&find_shared);
  bool ours = false;
  int64_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD) ours |= here >= begin && here < begin + part.p_memsz;
    if (part.p_type == PT_TLS) bytes = static_cast<int64_t>(part.p_memsz);
  }
  if (!ours) return 0;
  accesses.shared.begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  accesses.shared.end = accesses.shared.begin + bytes;
  return 1;
}

}  // namespace

void allow(const void* begin, int64_t bytes, bool writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  std::vector<Memory>& allowed = accesses.allowed;
  const auto same = std::find_if(allowed.begin(), allowed.end(), [&](const Memory& x) { return x.begin == at; });
  if (same == allowed.end())
    allowed.push_back({at, at + bytes, writable});
  else
    *same = {at, std::max(same->end, at + bytes), same->writable || writable};
}
void forget() { accesses.allowed.clear(); }
void seed(unsigned seed) { random_numbers.seed(seed); }

const char* launch(const Grid& grid, void (*function)(const void*), const void* argument, int64_t bytes) {
  error.clear();
  const unsigned threads = grid.threads.x;
  if (grid.blocks.x == 0 || threads == 0 || threads > most_threads || threads % 32 != 0) error = "no such grid";
  if (grid.shared_bytes < 0 || grid.shared_bytes > most_dynamic_bytes) error = "too much shared memory";
  volatile double* const touched = shared_memory;  // else the thread has none yet
  touched[0] = 0;
  dl_iterate_phdr(find_shared, nullptr);
  body = function;
  context = argument;
  current_grid = grid;
  accesses.next_launch();
  const uintptr_t dynamic = reinterpret_cast<uintptr_t>(shared_memory);
  accesses.beyond = {dynamic + grid.shared_bytes, dynamic + most_dynamic_bytes};
  if (fibers.size() < threads) fibers.resize(threads);
  const std::vector<Memory> before = accesses.allowed;
  allow(argument, bytes, false);
  for (unsigned b = 0; b < grid.blocks.x && error.empty(); ++b) {
    current_block = static_cast<int>(b);
    run_block();
  }
  accesses.allowed = before;
  return error.empty() ? nullptr : error.c_str();
}

unsigned thread() { return current; }
unsigned block() { return current_block; }
unsigned threads() { return current_grid.threads.x; }
unsigned blocks() { return current_grid.blocks.x; }
int lane() { return current % 32; }

void meet(bool whole_block, int call) {
  const int self = current, warp = self / 32;
  Meeting& meeting = whole_block ? meetings.back() : meetings[warp];
  if (meeting.arrived.empty()) meeting.call = call;
  if (meeting.call != call || call < 0) return stop("threads of a warp part");
  meeting.arrived.push_back(self);
  if (meeting.arrived.size() < (whole_block ? current_grid.threads.x : 32)) {
    fibers[self].waits = true;
    swapcontext(&fibers[self].context, &scheduler);
    return;
  }
  for (const int i : meeting.arrived) fibers[i].waits = false;
  meeting.arrived.clear();
  if (whole_block) ++epoch;
  if (whole_block || call == 1) ++steps[warp];
}

uint64_t shuffle(uint64_t word, int from, int call) {
  std::vector<uint64_t>& sent = words[turn[current]];
  turn[current] ^= 1;  // the other half may still be read
  sent[current] = word;
  meet(false, call);
  return sent[current / 32 * 32 + from];
}

}  // namespace emulated

// What -fsanitize=thread calls, in place of its own library.
#define ACCESSES(bytes)                                                                                  \
  void __tsan_read##bytes(void* x) { emulated::access(x, bytes, false); }                                \
  void __tsan_write##bytes(void* x) { emulated::access(x, bytes, true); }                                \
  void __tsan_unaligned_read##bytes(void* x) { emulated::access(x, bytes, false); }                      \
  void __tsan_unaligned_write##bytes(void* x) { emulated::access(x, bytes, true); }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* x, long bytes) { emulated::access(x, static_cast<int>(bytes), false); }
void __tsan_write_range(void* x, long bytes) { emulated::access(x, static_cast<int>(bytes), true); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
