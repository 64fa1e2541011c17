// The ops of csrc/cuda/*.torch.cpp on CPU tensors, their kernels emulated, as ops of another namespace.
#include "traced_torch.h"

#include <stdexcept>

#include "check.cpp"
#include "emulator.h"
#include "kernels.cpp"
#include "tensor.cpp"

#undef aoti_torch_empty_strided
#undef torch_get_const_data_ptr
#undef torch_get_mutable_data_ptr

namespace {

int guards = 0;

void allow(AtenTensorHandle tensor, void* begin, bool writable) {
  int64_t offset = 0, bytes = 0, numbers = 0;
  int32_t type = 0;
  aoti_torch_get_storage_size(tensor, &bytes);
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_numel(tensor, &numbers);
  aoti_torch_get_dtype(tensor, &type);
  const int64_t each = psf::item_bytes(static_cast<psf::ScalarType>(type)), rest = bytes - offset * each;
  emulated::allow(begin, numbers * each < rest ? numbers * each : rest, writable);
}

}  // namespace

AOTITorchError traced_empty(int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t type, int32_t device, int32_t index,
                            AtenTensorHandle* out) {
  const AOTITorchError status = aoti_torch_empty_strided(axes, sizes, strides, type, device, index, out);
  if (status != AOTI_TORCH_SUCCESS) return status;
  void* memory = nullptr;
  int64_t bytes = 0;
  torch_get_mutable_data_ptr(*out, &memory);
  aoti_torch_get_storage_size(*out, &bytes);
  if (bytes > 0) std::memset(memory, 0xff, bytes);  // NaN
  return status;
}
AOTITorchError traced_const_data_ptr(AtenTensorHandle tensor, const void** out) {
  const AOTITorchError status = torch_get_const_data_ptr(tensor, out);
  if (status == AOTI_TORCH_SUCCESS) allow(tensor, const_cast<void*>(*out), false);
  return status;
}
AOTITorchError traced_mutable_data_ptr(AtenTensorHandle tensor, void** out) {
  const AOTITorchError status = torch_get_mutable_data_ptr(tensor, out);
  if (status == AOTI_TORCH_SUCCESS) allow(tensor, *out, true);
  return status;
}
// The device and its stream are there while a guard is.
AOTITorchError traced_create_device_guard(int32_t, DeviceGuardHandle* out) {
  static char guard;
  *out = reinterpret_cast<DeviceGuardHandle>(&guard);
  ++guards;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError traced_delete_device_guard(DeviceGuardHandle) {
  if (--guards == 0) emulated::forget();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError traced_current_stream(int32_t, void** out) {
  *out = emulated::stream();
  return guards > 0 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

namespace psf {

void throw_value_error(const std::string& message) { throw std::runtime_error(message); }
void throw_type_error(const std::string& message) { throw std::runtime_error(message); }
void throw_runtime_error(const std::string& message) { throw std::runtime_error(message); }

}  // namespace psf

// Makes the kernels those of the ops of a namespace, on the CPU.
extern "C" __attribute__((visibility("default"))) void register_kernels_as(const char* name) {
  auto& library = *new torch::stable::detail::StableLibrary(torch::stable::detail::StableLibrary::Kind::IMPL, name, "CPU", __FILE__, __LINE__);
  for (const psf::Kernel& x : psf::kernels()) library.impl(x.name.c_str(), x.call);
}
