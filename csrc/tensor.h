// What the kernels use of torch, on its stable ABI: one build runs with every torch from PSF_OLDEST_TORCH on. These headers
// also compile in a tenth of the time of ATen's. Names and meanings are ATen's, but only for what the kernels need.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <array>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace psf {

using ScalarType = torch::headeronly::ScalarType;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using Integers = std::vector<int64_t>;
constexpr ScalarType kFloat = ScalarType::Float, kDouble = ScalarType::Double, kLong = ScalarType::Long, kByte = ScalarType::Byte;

// --- errors: Python sees ValueError, TypeError, RuntimeError ---

[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_type_error(const std::string& message);
[[noreturn]] void throw_runtime_error(const std::string& message);

inline std::ostream& operator<<(std::ostream& out, IntArrayRef x) {
  out << '[';
  for (size_t i = 0; i < x.size(); ++i) out << (i ? ", " : "") << x[i];
  return out << ']';
}
template <class... Parts> std::string joined(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  return text.str();
}

#define PSF_CHECK_AS(condition, kind, ...) \
  if (__builtin_expect(!(condition), 0)) psf::throw_##kind##_error(psf::joined(__VA_ARGS__))
#define PSF_CHECK_VALUE(condition, ...) PSF_CHECK_AS(condition, value, __VA_ARGS__)
#define PSF_CHECK_TYPE(condition, ...) PSF_CHECK_AS(condition, type, __VA_ARGS__)
#define PSF_CHECK(condition, ...) PSF_CHECK_AS(condition, runtime, __VA_ARGS__)

// --- tensors ---

struct Device {
  int32_t type, index;
  bool operator==(const Device& x) const { return type == x.type && index == x.index; }
};
std::ostream& operator<<(std::ostream& out, Device device);
Device cpu();

int64_t item_bytes(ScalarType type);

struct TensorOptions {
  ScalarType type;
  Device place;
  TensorOptions dtype(ScalarType x) const { return {x, place}; }
};

// Owns one reference to a torch tensor; empty: an undefined tensor.
class Tensor {
  AtenTensorHandle handle_ = nullptr;
  template <class X, class... In> X ask(const char* what, AOTITorchError (*f)(AtenTensorHandle, In...), X x = {}) const {
    PSF_CHECK_TYPE(handle_, "probsym_fast: a tensor must be given, got None");
    PSF_CHECK(f(handle_, &x) == AOTI_TORCH_SUCCESS, "probsym_fast: torch did not give the tensor's ", what);
    return x;
  }
  Tensor view_as(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t further = 0) const;

 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(const Tensor& x) { *this = x; }
  Tensor(Tensor&& x) noexcept : handle_(std::exchange(x.handle_, nullptr)) {}
  Tensor& operator=(const Tensor& x);
  Tensor& operator=(Tensor&& x) noexcept {
    std::swap(handle_, x.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  bool defined() const { return handle_ != nullptr; }
  int64_t dim() const { return ask<int64_t>("axes", aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>("numbers", aoti_torch_get_numel); }
  IntArrayRef sizes() const { return {ask<int64_t*>("sizes", aoti_torch_get_sizes), static_cast<size_t>(dim())}; }
  IntArrayRef strides() const { return {ask<int64_t*>("strides", aoti_torch_get_strides), static_cast<size_t>(dim())}; }
  int64_t size(int64_t axis) const { return sizes()[axis < 0 ? axis + dim() : axis]; }
  int64_t stride(int64_t axis) const { return strides()[axis]; }
  int64_t storage_offset() const { return ask<int64_t>("offset", aoti_torch_get_storage_offset); }
  int64_t storage_bytes() const { return ask<int64_t>("storage", aoti_torch_get_storage_size); }
  int32_t layout() const { return ask<int32_t>("layout", aoti_torch_get_layout); }
  ScalarType scalar_type() const { return static_cast<ScalarType>(ask<int32_t>("dtype", aoti_torch_get_dtype)); }
  Device device() const {
    return {ask<int32_t>("device", aoti_torch_get_device_type), ask<int32_t>("device", aoti_torch_get_device_index)};
  }
  TensorOptions options() const { return {scalar_type(), device()}; }
  bool is_contiguous() const { return ask<bool>("strides", aoti_torch_is_contiguous); }

  template <class T> const T* const_data_ptr() const { return static_cast<const T*>(ask<const void*>("memory", torch_get_const_data_ptr)); }
  template <class T> T* mutable_data_ptr() const { return static_cast<T*>(ask<void*>("memory", torch_get_mutable_data_ptr)); }

  Tensor contiguous() const;  // itself if it is
  // Views.
  Tensor permute(const std::vector<int64_t>& axes) const;
  Tensor transpose(int64_t a, int64_t b) const;
  Tensor t() const { return transpose(0, 1); }
  Tensor narrow(int64_t axis, int64_t first, int64_t count) const;
  Tensor view(IntArrayRef sizes) const;                  // of a contiguous tensor
  Tensor flatten(int64_t first, int64_t last) const;     // of a contiguous tensor
  Tensor unflatten(int64_t axis, IntArrayRef sizes) const;
};

void fill_rows(const Tensor& out, const Tensor& row);  // every row of out (..., D) becomes row (D,)

Tensor empty(IntArrayRef sizes, TensorOptions options);
Tensor zeros(IntArrayRef sizes, TensorOptions options);
inline Tensor empty_like(const Tensor& x) { return empty(x.sizes(), x.options()); }
inline Tensor zeros_like(const Tensor& x) { return zeros(x.sizes(), x.options()); }

// --- torch's products and sums on the CPU, in the dtype of their arguments: they pass by autocast ---

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b);                                            // out = a b
void addmm_(const Tensor& out, const Tensor& a, const Tensor& b, double beta = 1, double alpha = 1);         // out = beta out + alpha a b
inline Tensor mm(const Tensor& a, const Tensor& b) {
  const Tensor out = empty({a.size(0), b.size(1)}, a.options());
  mm_out(out, a, b);
  return out;
}
Tensor sum(const Tensor& x, const std::vector<int64_t>& axes);

// --- threads ---

int64_t get_num_threads();

// at::parallel_for; an exception that f throws arrives as it is.
template <class F> void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  struct Work {
    const F& f;
    std::exception_ptr error;
    std::mutex lock;
  } work{f, nullptr, {}};
  const auto run = [](int64_t first, int64_t last, void* context) {
    Work& work = *static_cast<Work*>(context);
    try {
      work.f(first, last);
    } catch (...) {
      const std::lock_guard guard(work.lock);
      if (!work.error) work.error = std::current_exception();
    }
  };
  PSF_CHECK(torch_parallel_for(begin, end, grain, run, &work) == AOTI_TORCH_SUCCESS, "probsym_fast: torch's threads failed");
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace psf

// f with scalar_t = float or double; the arguments' checks leave no other dtype.
#define PSF_DISPATCH_FLOATING(dtype, ...) \
  [&] {                                   \
    if ((dtype) == psf::kFloat) {         \
      using scalar_t = float;             \
      return __VA_ARGS__();               \
    }                                     \
    using scalar_t = double;              \
    return __VA_ARGS__();                 \
  }()
