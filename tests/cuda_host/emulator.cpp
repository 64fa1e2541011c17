// Threads of a block as coroutines, blocks one after the other; and every access to memory judged.
#include "emulator.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

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
constexpr int nobody = -1, several = -2;

struct Memory {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  bool holds(uintptr_t at, int bytes) const { return at >= begin && at + bytes <= end; }
};

// What the threads of a launch did to four bytes. Two accesses are in order if a barrier of the block lies between them, or,
// for threads of one warp, a barrier of the warp. (Shuffles order nothing.) Blocks are never in order.
struct Cell {
  int block = nobody;
  bool written = false;
  int epoch = 0;               // barriers of the block; what follows is of this epoch
  int writer = nobody, write_step = 0;
  int reader_warp = nobody, reader = nobody, read_step = 0;  // the last readers
};

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
std::vector<Memory> allowed;
Memory shared;  // this library's thread-local variables: they are the kernels' __shared__ ones
std::unordered_map<uintptr_t, Cell> cells, shared_cells;
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

bool in_order(int other, int step) {
  return other == current || (other >= 0 && other / 32 == current / 32 && step < steps[current / 32]);
}

void record(Cell& cell, bool write) {
  const bool first = cell.block == nobody;
  if (!first && cell.block != current_block) {
    if (write || cell.written) return stop("a race: blocks share memory that one of them writes");
    cell.block = several;
    return;
  }
  cell.block = current_block;
  if (first || cell.epoch != epoch) {
    cell.epoch = epoch;
    cell.writer = cell.reader_warp = cell.reader = nobody;
  }
  if (cell.writer != nobody && !in_order(cell.writer, cell.write_step))
    return stop(write ? "a race: threads write the same memory" : "a race: a thread reads what another writes");
  const int warp = current / 32, step = steps[warp];
  if (write) {
    const bool read = cell.reader_warp != nobody && cell.reader != current;
    if (read && (cell.reader_warp != warp || cell.read_step == step)) return stop("a race: a thread writes what another reads");
    cell.writer = current;
    cell.write_step = step;
    cell.written = true;
  } else if (cell.reader_warp == nobody || (cell.reader_warp == warp && cell.read_step < step)) {
    cell.reader_warp = warp;
    cell.reader = current;
    cell.read_step = step;
  } else if (cell.reader_warp != warp) {
    cell.reader_warp = cell.reader = several;
  } else if (cell.reader != current) {
    cell.reader = several;
  }
}

void access(const void* address, int bytes, bool write) {
  if (current == nobody) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), stack = reinterpret_cast<uintptr_t>(fibers[current].stack.get());
  if (at >= stack && at < stack + stack_bytes) return;
  const bool is_shared = shared.holds(at, bytes);
  if (is_shared) {
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(shared_memory), end = dynamic + current_grid.shared_bytes;
    if (at + bytes > end && at < dynamic + most_dynamic_bytes && at >= dynamic) return stop("beyond the shared memory");
  } else {
    const auto found = std::find_if(allowed.begin(), allowed.end(), [&](const Memory& x) { return x.holds(at, bytes); });
    if (found == allowed.end()) return stop("an access outside of all memory of the launch");
    if (write && !found->writable) return stop("a write to an input");
    if (found != allowed.begin()) std::swap(*found, allowed.front());  // most likely the next one, too
  }
  for (uintptr_t x = at / 4; x <= (at + bytes - 1) / 4; ++x) {
    Cell& cell = (is_shared ? shared_cells : cells)[x];
    if (is_shared && !write && !cell.written) return stop("shared memory is read before it is written");
    record(cell, write);
    if (!error.empty()) return;
  }
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
  shared_cells.clear();
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

// Of the library that holds this function.
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
  shared.begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  shared.end = shared.begin + bytes;
  return 1;
}

}  // namespace

void allow(const void* begin, int64_t bytes, bool writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  const auto same = std::find_if(allowed.begin(), allowed.end(), [&](const Memory& x) { return x.begin == at; });
  if (same == allowed.end())
    allowed.push_back({at, at + bytes, writable});
  else
    *same = {at, std::max(same->end, at + bytes), same->writable || writable};
}
void forget() { allowed.clear(); }
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
  cells.clear();
  if (fibers.size() < threads) fibers.resize(threads);
  const std::vector<Memory> before = allowed;
  allowed.push_back({reinterpret_cast<uintptr_t>(argument), reinterpret_cast<uintptr_t>(argument) + bytes, false});
  for (unsigned b = 0; b < grid.blocks.x && error.empty(); ++b) {
    current_block = static_cast<int>(b);
    run_block();
  }
  allowed = before;
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
