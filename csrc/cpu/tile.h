// Rows of nodes side by side in the lanes of vectors. A row has `segments` neighbouring lanes, so even few rows fill the
// lanes: lane row * segments + s holds its slots s * slots to (s + 1) * slots - 1.
#pragma once
#include <algorithm>
#include <cstdint>

namespace psf {

template <class T> struct Tile {
  static constexpr int most_lanes = 64 / sizeof(T);
  int64_t N = 0;  // distance of the rows in memory
  int rows = 0, segments = 1;
  int64_t slots = 0;
  int64_t nodes[most_lanes] = {};  // valid nodes of each row
  int64_t start[most_lanes] = {};  // where each lane's slots begin, counted from the first row
  int64_t count[most_lanes] = {};  // number of valid ones: 0 for a lane without a row

  // The same rows with another number of slots per lane.
  Tile with_slots(int64_t n) const {
    Tile tile = *this;
    tile.slots = n;
    for (int row = 0; row < rows; ++row)
      for (int s = 0; s < segments; ++s) {
        tile.start[row * segments + s] = row * N + s * n;
        tile.count[row * segments + s] = std::clamp<int64_t>(nodes[row] - s * n, 0, n);
      }
    return tile;
  }
};

// Lanes per row, from N only, so that a row's results depend neither on the batch nor on the threads. About 50 slots per
// lane: enough to pay for starting a pass, few enough for their arrays to fit the L1 cache.
inline int row_segments(int64_t N, int lanes) {
  int segments = 1;
  while (segments < 8 && segments < lanes && N > 56 * segments) segments *= 2;
  return segments;
}

}  // namespace psf
