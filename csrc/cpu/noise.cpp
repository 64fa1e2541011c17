// noise on the CPU: keys of (row, sample) here, numbers from counters in noise.kernel.h.
#include "../kernels.h"
#include "rows.h"
#define PSF_KERNEL "noise.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
constexpr int64_t part = 512;  // values at a time, whole vectors

uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Counters of up to `part` values, one list per stream.
struct Part {
  uint64_t counters[2][part] = {}, flip[part] = {};
  double numbers[part];
  int64_t filled = 0;
  void write(bool normal, double* out) {
    if (normal) {
      PSF_DISPATCH(normal_numbers(counters[0], counters[1], flip, filled, numbers));
    } else {
      PSF_DISPATCH(uniform_numbers(counters[0], flip, filled, numbers));
    }
    std::memcpy(out, numbers, filled * sizeof(double));
    filled = 0;
  }
};

Tensor noise(const Tensor& seed, const std::optional<Tensor>& rows_in, const Integers& shape, int64_t first,
             const std::optional<Integers>& forks, const Integers& streams, int64_t block, bool mirrored) {
  Arguments in("noise");
  PSF_CHECK_VALUE(shape.size() >= 2, "noise: shape must be (rows, S, ...), got ", shape);
  for (const int64_t size : shape) in.count("shape", size, 0, std::numeric_limits<int64_t>::max());
  PSF_CHECK_VALUE(streams.size() == 1 || streams.size() == 2, "noise: streams must be one or two, got ", streams.size());
  in.count("block", block, 1, std::numeric_limits<int64_t>::max());
  in.count("first", first, 0, std::numeric_limits<int64_t>::max() - shape[1]);
  in.integers("seed", seed, {});
  Dim count{"rows"};
  count.size = shape[0];
  const Tensor rows = in.integers("rows", rows_in, {&count});
  const Tensor out = empty(shape, seed.options().dtype(kDouble));
  const int64_t samples = shape[1], pairs = out.numel() ? count * samples : 0, places = pairs ? out.numel() / pairs : 0;
  const int64_t* names = rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr;
  uint64_t root = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  for (const int64_t number : forks.value_or(Integers())) root = mix(root + golden * (static_cast<uint64_t>(number) + 1)) >> 2;
  uint64_t start[2] = {};
  for (size_t k = 0; k < streams.size(); ++k) start[k] = mix(root ^ static_cast<uint64_t>(streams[k]));
  const bool normal = streams.size() == 2;
  double* numbers = out.mutable_data_ptr<double>();
  parallel_for(0, pairs, grain(double(places), 8192), [&](int64_t begin, int64_t end) {
    Part some;
    double* next = numbers + begin * places;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t row = pair / samples;
      const uint64_t name = static_cast<uint64_t>(names ? names[row] : row);
      const uint64_t sample = static_cast<uint64_t>(first + pair % samples), place_in_block = sample / static_cast<uint64_t>(block);
      uint64_t key[2] = {};
      for (size_t k = 0; k < streams.size(); ++k) key[k] = mix(mix(start[k] + name * golden) + place_in_block * golden);
      const uint64_t flip = mirrored && sample % 2 ? 0xFFFFFFFFu : 0;
      for (int64_t place = 0; place < places;) {
        const int64_t here = std::min(part - some.filled, places - place);
        for (int64_t i = 0; i < here; ++i) {
          const uint64_t step = golden * static_cast<uint64_t>(place + i + 1);
          some.counters[0][some.filled + i] = key[0] + step;
          some.counters[1][some.filled + i] = key[1] + step;
          some.flip[some.filled + i] = flip;
        }
        place += here;
        some.filled += here;
        if (some.filled == part) {
          some.write(normal, next);
          next += part;
        }
      }
    }
    some.write(normal, next);
  });
  return out;
}

}  // namespace

PSF_KERNELS(CPU, m) { m.add<&noise>("noise"); }

}  // namespace psf
