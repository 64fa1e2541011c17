// Threads of a block as coroutines on the host: the row kernels of csrc/cuda run unchanged, and what a GPU leaves open is
// made worse: between barriers the threads of a warp run in random order, warps run ahead of others as far as the block's
// barriers let them, and memory holds NaN before it is written. Every call that
// a warp or a block makes together is compared; threads that part, or wait for ever, end the run with an error.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

class Block {
 public:
  Block(int threads, unsigned seed) : threads(threads), random(seed), fibers(threads), stacks(threads), waits(threads, 0) {
    for (auto& x : words) x.resize(threads);
    turn.resize(threads, 0);
    meetings.resize(threads / 32 + 1);
  }

  void run(const std::function<void(int)>& f) {
    body = &f;
    done = 0;
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    finished.assign(threads, false);
    warps.resize(threads / 32);
    std::iota(warps.begin(), warps.end(), 0);
    std::shuffle(warps.begin(), warps.end(), random);
    for (int i = 0; i < threads; ++i) {
      stacks[i].resize(256 << 10);
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i].data();
      fibers[i].uc_stack.ss_size = stacks[i].size();
      fibers[i].uc_link = &scheduler;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&fibers[i], reinterpret_cast<void (*)()>(&Block::enter), 3, static_cast<unsigned>(self),
                  static_cast<unsigned>(self >> 32), i);
    }
    while (done < threads && error.empty()) {
      std::shuffle(order.begin(), order.end(), random);
      if (random() % 64 == 0) std::shuffle(warps.begin(), warps.end(), random);
      if (!step(order) && error.empty()) error = "threads wait for ever";
    }
    if (!error.empty()) throw std::runtime_error(error);
  }

  // Waits for the warp or the block; all must do the same: `call` tells what.
  void meet(int thread, bool whole_block, int call) {
    Meeting& meeting = meetings[whole_block ? threads / 32 : thread / 32];
    const int wanted = whole_block ? threads : 32;
    if (meeting.arrived.empty()) meeting.call = call;
    if (meeting.call != call) return fail("threads of a warp part");
    meeting.arrived.push_back(thread);
    if (static_cast<int>(meeting.arrived.size()) == wanted) {
      for (const int i : meeting.arrived) waits[i] = 0;
      meeting.arrived.clear();
    } else {
      waits[thread] = 1;
      swapcontext(&fibers[thread], &scheduler);
    }
  }

  template <class T> T shuffle(int thread, T x, int from, int call) {
    std::vector<uint64_t>& word = words[turn[thread]];
    turn[thread] ^= 1;  // the other half may still be read
    std::memcpy(&word[thread], &x, sizeof x);
    meet(thread, false, call);
    std::memcpy(&x, &word[from], sizeof x);
    return x;
  }

  const int threads;

 private:
  struct Meeting {
    std::vector<int> arrived;
    int call = 0;
  };
  static void enter(unsigned low, unsigned high, int thread) {
    Block* const block = reinterpret_cast<Block*>(uintptr_t(high) << 32 | low);
    (*block->body)(thread);
    block->finished[thread] = true;
    ++block->done;
  }
  // Runs the first warp that can go on, each thread of it once; whether there was one.
  bool step(const std::vector<int>& order) {
    for (const int warp : warps) {
      bool moved = false;
      for (const int i : order) {
        if (i / 32 != warp || finished[i] || waits[i]) continue;
        moved = true;
        current = i;
        swapcontext(&scheduler, &fibers[i]);
        if (!error.empty()) break;
      }
      if (moved) return true;
    }
    return false;
  }
  void fail(const char* what) {
    error = what;
    swapcontext(&fibers[current], &scheduler);
  }
  std::mt19937 random;
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<char> waits, finished;
  std::vector<int> turn, warps;
  std::vector<uint64_t> words[2];
  std::vector<Meeting> meetings;
  const std::function<void(int)>* body = nullptr;
  int done = 0, current = 0;
  std::string error;
};

struct Thread {
  Block* block;
  int number;
  int index() const { return number; }
  int count() const { return block->threads; }
  template <class T> T shuffle_up(T x, int lanes) const {
    return block->shuffle(number, x, number % 32 >= lanes ? number - lanes : number, 100 + lanes);
  }
  template <class T> T shuffle_down(T x, int lanes) const {
    return block->shuffle(number, x, number % 32 + lanes < 32 ? number + lanes : number, 200 + lanes);
  }
  template <class T> T shuffle_xor(T x, int mask) const { return block->shuffle(number, x, number ^ mask, 300 + mask); }
  void sync_warp() const { block->meet(number, false, 1); }
  void sync_block() const { block->meet(number, true, 2); }
};

}  // namespace emulated
