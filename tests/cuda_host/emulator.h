// A GPU on the host, thread for thread: what cuda_runtime.h here makes of CUDA's launches, barriers and shuffles. What a GPU
// leaves open is made worse: between barriers the threads of a warp run in random order, warps run ahead of others as far as
// the block's barriers let them, and shared memory holds NaN before it is written. Every call that a warp or a block makes
// together is compared; threads that part, or wait for ever, end the launch with an error.
//
// The kernels are compiled with -fsanitize=thread, whose calls at every access arrive in emulator.cpp. It refuses an access
// outside of the memory that the launch was given, and a race, whatever the order in which the threads happened to run.
#pragma once
#include <cstdint>

namespace emulated {

struct Size {
  unsigned x = 1;
  constexpr Size(int64_t x = 1) : x(static_cast<unsigned>(x)) {}
};
struct Grid {
  Size blocks, threads;
  int64_t shared_bytes;
};

// Memory that kernels may read, and write where `writable`, until forget().
void allow(const void* begin, int64_t bytes, bool writable);
void forget();
void seed(unsigned seed);
inline void* stream() { return reinterpret_cast<void*>(0x5eed); }  // that launches must be on

// Runs body(context) as every thread of every block; `context`, of some bytes, can be read. What went wrong, or null.
const char* launch(const Grid& grid, void (*body)(const void*), const void* context, int64_t bytes);

// For the running thread.
unsigned thread(), block(), threads(), blocks();
void meet(bool whole_block, int call);  // waits for its warp or block; all must do the same: `call` says what
uint64_t shuffle(uint64_t word, int from, int call);  // the word of the warp's thread `from`
int lane();

}  // namespace emulated
