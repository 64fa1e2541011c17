#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace psf {
namespace {

void check(AOTITorchError status, const char* what) { PSF_CHECK(status == AOTI_TORCH_SUCCESS, "probsym_fast: torch failed in ", what); }

std::vector<int64_t> contiguous_strides(IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  return strides;
}

StableIValue boxed(const Tensor& x) {
  AtenTensorHandle handle;
  check(aoti_torch_new_tensor_handle(x.get(), &handle), "new_tensor_handle");
  return torch::stable::detail::from(handle);
}

// Calls an operator that returns one tensor, through the dispatcher; takes the stack's references.
Tensor call(const char* name, const char* overload, StableIValue* stack) {
  check(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION), name);
  return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

}  // namespace

Device cpu() {
  static const Device device{aoti_torch_device_type_cpu(), -1};
  return device;
}

int64_t item_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: case ScalarType::Byte: case ScalarType::Char: return 1;
    case ScalarType::Short: case ScalarType::Half: case ScalarType::BFloat16: return 2;
    case ScalarType::Int: case ScalarType::Float: return 4;
    case ScalarType::ComplexDouble: return 16;
    default: return 8;  // the longest of those that the kernels take
  }
}

std::ostream& operator<<(std::ostream& out, Device device) {
  const char* name = device.type == aoti_torch_device_type_cpu()    ? "cpu"
                     : device.type == aoti_torch_device_type_cuda() ? "cuda"
                     : device.type == aoti_torch_device_type_meta() ? "meta"
                                                                    : "another device";
  out << name;
  return device.index < 0 ? out : out << ':' << device.index;
}

Tensor& Tensor::operator=(const Tensor& x) {
  Tensor copy;
  if (x.handle_) check(aoti_torch_new_tensor_handle(x.handle_, &copy.handle_), "new_tensor_handle");
  std::swap(handle_, copy.handle_);
  return *this;
}

Tensor Tensor::view_as(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t further) const {
  AtenTensorHandle view;
  const auto axes = static_cast<int64_t>(sizes.size());
  check(aoti_torch__reinterpret_tensor(handle_, axes, sizes.data(), strides.data(), further, &view), "a view");
  return Tensor(view);
}

Tensor Tensor::contiguous() const {
  if (is_contiguous()) return *this;
  const Tensor out = empty_like(*this);
  check(aoti_torch_copy_(out.handle_, handle_, 0), "copy_");
  return out;
}

Tensor Tensor::permute(const std::vector<int64_t>& axes) const {
  std::vector<int64_t> sizes, strides;
  for (const int64_t axis : axes) {
    sizes.push_back(size(axis));
    strides.push_back(stride(axis));
  }
  return view_as(sizes, strides);
}

Tensor Tensor::transpose(int64_t a, int64_t b) const {
  std::vector<int64_t> axes(dim());
  std::iota(axes.begin(), axes.end(), 0);
  std::swap(axes[a], axes[b]);
  return permute(axes);
}

Tensor Tensor::narrow(int64_t axis, int64_t first, int64_t count) const {
  std::vector<int64_t> sizes(this->sizes().begin(), this->sizes().end()), strides(this->strides().begin(), this->strides().end());
  sizes[axis] = count;
  return view_as(sizes, strides, first * strides[axis]);
}

Tensor Tensor::view(IntArrayRef sizes) const {
  return view_as(std::vector<int64_t>(sizes.begin(), sizes.end()), contiguous_strides(sizes));
}

Tensor Tensor::flatten(int64_t first, int64_t last) const {
  const IntArrayRef old = sizes();
  if (last < 0) last += dim();
  std::vector<int64_t> sizes(old.begin(), old.begin() + first);
  sizes.push_back(std::accumulate(old.begin() + first, old.begin() + last + 1, int64_t{1}, std::multiplies<>()));
  sizes.insert(sizes.end(), old.begin() + last + 1, old.end());
  return view(sizes);
}

Tensor Tensor::unflatten(int64_t axis, IntArrayRef parts) const {
  std::vector<int64_t> sizes(this->sizes().begin(), this->sizes().end());
  sizes.erase(sizes.begin() + axis);
  sizes.insert(sizes.begin() + axis, parts.begin(), parts.end());
  return view(sizes);
}

Tensor empty(IntArrayRef sizes, TensorOptions options) {
  AtenTensorHandle out = nullptr;
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  const AOTITorchError status =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(options.type),
                               options.place.type, options.place.index, &out);
  // the words by which callers know it: torch's own message stays within the stable ABI
  PSF_CHECK(status == AOTI_TORCH_SUCCESS, "probsym_fast: out of memory: can't allocate ", sizes, " on ", options.place);
  return Tensor(out);
}

Tensor zeros(IntArrayRef sizes, TensorOptions options) {
  const Tensor out = empty(sizes, options);
  check(aoti_torch_zero_(out.get()), "zero_");
  return out;
}

void fill_rows(const Tensor& out, const Tensor& row_in) {
  const Tensor row = row_in.contiguous();
  const int64_t bytes = row.numel() * item_bytes(row.scalar_type()), count = row.numel() > 0 ? out.numel() / row.numel() : 0;
  char* to = out.mutable_data_ptr<char>();
  const char* from = row.const_data_ptr<char>();
  parallel_for(0, count, 1 + 65536 / (1 + bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(to + i * bytes, from, bytes);
  });
}

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) { check(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), "mm"); }

void addmm_(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  check(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha), "addmm");
}

Tensor sum(const Tensor& x, const std::vector<int64_t>& axes) {
  StableIValue stack[]{boxed(x), torch::stable::detail::from(std::optional(axes)), torch::stable::detail::from(false),
                       torch::stable::detail::from(std::optional<ScalarType>())};
  return call("aten::sum", "dim_IntList", stack);
}

int64_t get_num_threads() {
  uint32_t threads = 1;
  check(torch_get_num_threads(&threads), "get_num_threads");
  return threads;
}

}  // namespace psf
