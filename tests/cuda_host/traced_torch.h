// Included before the files of csrc that call torch: a kernel may touch the memory that its launch asked of torch, and no more.
#pragma once
#include <torch/csrc/stable/c/shim.h>

AOTITorchError traced_empty(int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t type, int32_t device, int32_t index,
                            AtenTensorHandle* out);
AOTITorchError traced_const_data_ptr(AtenTensorHandle tensor, const void** out);
AOTITorchError traced_mutable_data_ptr(AtenTensorHandle tensor, void** out);
AOTITorchError traced_create_device_guard(int32_t index, DeviceGuardHandle* out);
AOTITorchError traced_delete_device_guard(DeviceGuardHandle guard);
AOTITorchError traced_current_stream(int32_t index, void** out);

#define aoti_torch_empty_strided traced_empty
#define torch_get_const_data_ptr traced_const_data_ptr
#define torch_get_mutable_data_ptr traced_mutable_data_ptr
#define aoti_torch_create_device_guard traced_create_device_guard
#define aoti_torch_delete_device_guard traced_delete_device_guard
#define aoti_torch_get_current_cuda_stream traced_current_stream
