#include "check.h"

#include <cmath>
#include <sstream>

namespace psf {
namespace {

constexpr int64_t most_numbers = int64_t{1} << 60;  // per tensor: the bytes of a few of them fit 64 bits

std::string spelled(ScalarType dtype) {
  switch (dtype) {  // as Python spells those whose C++ name is another
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: return std::string("torch.") + torch::headeronly::toString(dtype);
  }
}

std::string listed(IntArrayRef sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  return text.str();
}

// The expected shape: known sizes, else their limits.
std::string expected(Dims dims) {
  std::ostringstream names, sizes;
  for (const Dim* const* dim = dims.begin(); dim != dims.end(); ++dim) {
    const Dim& x = **dim;
    const char* comma = dim == dims.begin() ? "" : ", ";
    names << comma << x.name;
    sizes << comma;
    if (x.size >= 0) {
      sizes << x.size;
    } else if (x.most < std::numeric_limits<int64_t>::max()) {
      sizes << x.least << ".." << x.most;
    } else if (x.least > 0) {
      sizes << ">= " << x.least;
    } else {
      sizes << '*';
    }
  }
  return "(" + names.str() + ") = (" + sizes.str() + ")";
}

}  // namespace

// The whole tensor must be in memory: a storage can shrink after the tensor is made.
void Arguments::memory(const char* name, const Tensor& x) const {
  PSF_CHECK_TYPE(x.defined(), op, ": ", name, " must be a tensor, got None");
  PSF_CHECK(x.device() == device_ && x.layout() == aoti_torch_layout_strided(), op, ": ", name, " must be a dense tensor on ", device_, ", got ",
            x.layout() == aoti_torch_layout_strided() ? "one" : "another layout", " on ", x.device());
  const IntArrayRef sizes = x.sizes(), strides = x.strides();
  int64_t numbers = 1, last = x.storage_offset();
  const bool empty = x.numel() == 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool overflow = __builtin_mul_overflow(numbers, std::max<int64_t>(1, sizes[i]), &numbers) || numbers > most_numbers;
    PSF_CHECK_VALUE(!overflow, op, ": ", name, " must have at most ", most_numbers, " numbers, axes of 0 left out, got ", sizes);
    if (!empty) last += (sizes[i] - 1) * strides[i];
  }
  const int64_t bytes = x.storage_bytes(), each = item_bytes(x.scalar_type());
  PSF_CHECK_VALUE(empty || last < bytes / each, op, ": ", name, " must lie in its storage, got ", sizes,
                    " in ", bytes, " bytes");
}

void Arguments::shape(const char* name, const Tensor& x, Dims dims) const {
  const IntArrayRef sizes = x.sizes();
  bool fits = sizes.size() == dims.size();
  const int64_t* size = sizes.data();
  for (Dim* const* dim = dims.begin(); fits && dim != dims.end(); ++dim, ++size) {
    Dim& d = **dim;
    if (d.size < 0 && *size >= d.least && *size <= d.most) d.size = *size;
    fits = d.size == *size;
  }
  PSF_CHECK_VALUE(fits, op, ": ", name, " must be ", expected(dims), ", got (", listed(sizes), ")");
}

const Tensor& Arguments::floats(const char* name, const Tensor& x) {
  memory(name, x);
  const ScalarType dtype = x.scalar_type();
  if (!first_) {
    PSF_CHECK_TYPE(dtype == kFloat || dtype == kDouble, op, ": ", name, " must be torch.float32 or torch.float64, got ",
                     spelled(dtype));
    first_ = name;
    dtype_ = dtype;
  }
  PSF_CHECK_TYPE(dtype == dtype_, op, ": ", name, " must be ", spelled(dtype_), " as ", first_, " is, got ", spelled(dtype));
  return x;
}

const Tensor& Arguments::floats(const char* name, const Tensor& x, Dims dims) {
  shape(name, floats(name, x), dims);
  return x;
}

const Tensor& Arguments::integers(const char* name, const Tensor& x, Dims dims, ScalarType type) {
  memory(name, x);
  PSF_CHECK_TYPE(x.scalar_type() == type, op, ": ", name, " must be ", spelled(type), ", got ", spelled(x.scalar_type()));
  shape(name, x, dims);
  return x;
}

void Arguments::soft(const std::optional<Tensor>& t, const std::optional<Tensor>& log_r, const std::optional<Tensor>& log_c,
                     double tau, Dims dims, bool needed) {
  temperature(tau);
  PSF_CHECK_VALUE(t.has_value() == log_r.has_value() && t.has_value() == log_c.has_value(), op,
                    ": t, log_r and log_c must be three tensors or three Nones, got some of each");
  PSF_CHECK_VALUE(t.has_value() || !needed, op, ": t must be a tensor where its gradient is asked for, got None");
  if (!t) return;
  floats("t", *t, dims);
  floats("log_r", *log_r, dims);
  floats("log_c", *log_c, dims);
}

void Arguments::same_shape(const char* name, const Tensor& x, const char* as, const Tensor& y) const {
  PSF_CHECK_VALUE(x.sizes().equals(y.sizes()), op, ": ", name, " must be (", listed(y.sizes()), ") as ", as, " is, got (",
                    listed(x.sizes()), ")");
}

void Arguments::count(const char* name, int64_t n, int64_t least, int64_t most) const {
  PSF_CHECK_VALUE(n >= least && n <= most, op, ": ", name, " must be in ", least, "..", most, ", got ", n);
}

void Arguments::temperature(double tau) const {
  PSF_CHECK_VALUE(std::isfinite(tau) && tau > 0, op, ": tau must be finite and > 0, got ", tau);
}

NumNodes::NumNodes(Arguments& in, const std::optional<Tensor>& num_nodes, Dim& B, int64_t N)
    : held_(in.integers("num_nodes", num_nodes, {&B})) {
  if (!held_.defined()) return;
  counts_ = held_.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    PSF_CHECK_VALUE(counts_[b] >= 1 && counts_[b] <= N, in.op, ": num_nodes must be between 1 and N = ", N, ", got ", counts_[b],
                      " for graph ", b);
}

void check_offsets(const char* op, const int64_t* offsets, int64_t B, int64_t N) {
  PSF_CHECK_VALUE(offsets[0] == 0, op, ": ptr must begin with 0, got ", offsets[0]);
  for (int64_t b = 0; b < B; ++b) {
    PSF_CHECK_VALUE(offsets[b + 1] >= offsets[b], op, ": ptr must rise, got ", offsets[b + 1], " after ", offsets[b]);
    const int64_t nodes = offsets[b + 1] - offsets[b];
    PSF_CHECK_VALUE(nodes <= N, op, ": ptr must give every graph 0 to N = ", N, " nodes, got ", nodes, " for graph ", b);
  }
}

void check_row(const char* op, const char* name, const int64_t* row, int64_t n, int64_t end, int64_t b) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(row[i]) >= static_cast<uint64_t>(end);
  for (int64_t i = 0; bad && i < n; ++i)
    PSF_CHECK_VALUE(row[i] >= 0 && row[i] < end, op, ": ", name, " must hold 0 to ", end - 1, ", got ", row[i], " for graph ", b);
}

}  // namespace psf
