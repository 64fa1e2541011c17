// Judges the accesses of a launch: they must lie in its memory, and be in order where threads share it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace emulated {

struct Memory {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  bool holds(uintptr_t at, int bytes) const { return at >= begin && at + bytes <= end; }
};

// Who makes an access, and how many barriers its block and its warp have passed.
struct Who {
  int thread, block, epoch, step;
  int warp() const { return thread / 32; }
};

class Accesses {
 public:
  std::vector<Memory> allowed;  // beside shared memory
  Memory shared, beyond;        // shared memory, and the part of it that this launch does not have

  // What is wrong with an access, or null.
  const char* judge(uintptr_t at, int bytes, bool write, const Who& who) {
    const bool is_shared = shared.holds(at, bytes);
    if (is_shared && at + bytes > beyond.begin && at < beyond.end) return "beyond the shared memory";
    if (!is_shared) {
      const auto found = std::find_if(allowed.begin(), allowed.end(), [&](const Memory& x) { return x.holds(at, bytes); });
      if (found == allowed.end()) return "an access outside of all memory of the launch";
      if (write && !found->writable) return "a write to an input";
      if (found != allowed.begin()) std::swap(*found, allowed.front());  // most likely the next one, too
    }
    for (uintptr_t x = at / 4; x <= (at + bytes - 1) / 4; ++x) {
      Cell& cell = (is_shared ? in_shared : elsewhere)[x];
      if (is_shared && !write && !cell.written) return "shared memory is read before it is written";
      if (const char* const problem = record(cell, write, who)) return problem;
    }
    return nullptr;
  }
  void next_launch() { elsewhere.clear(); }
  void next_block() { in_shared.clear(); }

 private:
  static constexpr int nobody = -1, several = -2;

  // What was done to four bytes in this launch. Two accesses are in order if a barrier of the block lies between them, or, for
  // threads of one warp, a barrier of the warp. (Shuffles order nothing.) Blocks are never in order.
  struct Cell {
    int block = nobody;
    bool written = false;
    int epoch = 0;  // what follows is of this one
    int writer = nobody, write_step = 0;
    int reader_warp = nobody, reader = nobody, read_step = 0;  // the last readers
  };
  std::unordered_map<uintptr_t, Cell> elsewhere, in_shared;

  static const char* record(Cell& cell, bool write, const Who& who) {
    const bool first = cell.block == nobody;
    if (!first && cell.block != who.block) {
      cell.block = several;
      return write || cell.written ? "a race: blocks share memory that one of them writes" : nullptr;
    }
    cell.block = who.block;
    if (first || cell.epoch != who.epoch) {
      cell.epoch = who.epoch;
      cell.writer = cell.reader_warp = cell.reader = nobody;
    }
    const bool other = cell.writer != nobody && cell.writer != who.thread;
    if (other && (cell.writer / 32 != who.warp() || cell.write_step == who.step))
      return write ? "a race: threads write the same memory" : "a race: a thread reads what another writes";
    if (write) {
      const bool read = cell.reader_warp != nobody && cell.reader != who.thread;
      if (read && (cell.reader_warp != who.warp() || cell.read_step == who.step))
        return "a race: a thread writes what another reads";
      cell.writer = who.thread;
      cell.write_step = who.step;
      cell.written = true;
    } else if (cell.reader_warp == nobody || (cell.reader_warp == who.warp() && cell.read_step < who.step)) {
      cell.reader_warp = who.warp();
      cell.reader = who.thread;
      cell.read_step = who.step;
    } else if (cell.reader_warp != who.warp()) {
      cell.reader_warp = cell.reader = several;
    } else if (cell.reader != who.thread) {
      cell.reader = several;
    }
    return nullptr;
  }
};

}  // namespace emulated
