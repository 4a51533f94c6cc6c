// What the parts of the rehearsal GPU share: the device they present, and the record of what was asked of it.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace rehearsal {

constexpr const char *kName = "NVIDIA H100 80GB HBM3";
constexpr const char *kUuid = "GPU-00000000-0000-0000-0000-000000000000";
constexpr const char *kPciBusId = "0000:00:04.0";
constexpr int kCudaVersion = 13000;
constexpr size_t kTotalMemory = 85'029'158'912;
constexpr size_t kContextMemory = 1'200'000'000;  // what the context and loaded code take of it

// Copies within the device and fills are left out above this size, so that memory which nobody reads is never touched.
constexpr size_t kLargestCopy = 1 << 20;

// An attribute of the device. CUdevice_attribute and cudaDeviceAttr have the same numbers.
int attribute(int which);

// A kernel, or a library's call that would launch one, given to a stream.
void launched(CUstream stream);

// The host is about to wait for the device in `call`. Nothing is waited for; cudaErrorNotPermitted if an observer
// refuses the wait.
cudaError_t waits(const char *call, const char *reason);

// A copy of `bytes` bytes, as far as it is made at all; see kLargestCopy.
cudaError_t copy(void *target, const void *source, size_t bytes, bool asynchronous, cudaStream_t stream);

}  // namespace rehearsal
