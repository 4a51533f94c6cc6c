// CUDA's driver and NVML, as far as Triton, Inductor's launchers and PyTorch ask for them.

#include "device.h"

#include <cstdio>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace rehearsal;

// Modules, functions and contexts are never looked into: any handle that is not null will do.
template <typename Handle>
static CUresult give_handle(Handle *handle) {
  *handle = reinterpret_cast<Handle>(1);
  return CUDA_SUCCESS;
}

// --- device and context ---

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = kCudaVersion;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int) {
  *device = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice) {
  snprintf(name, size, "%s", kName);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return give_handle(context); }

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { return give_handle(context); }

EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

EXPORT CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

EXPORT CUresult cuGetErrorName(CUresult, const char **name) {
  *name = "REHEARSAL_ERROR";
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult, const char **text) {
  *text = "an error of the rehearsal GPU's driver";
  return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *static_cast<CUdeviceptr *>(value) = pointer;
  } else {
    *static_cast<int *>(value) = 0;
  }
  return CUDA_SUCCESS;
}

// --- code ---

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *) { return give_handle(module); }

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *) { return give_handle(module); }

EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *, unsigned, CUjit_option *, void **) {
  return give_handle(module);
}

EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *) { return give_handle(function); }

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

EXPORT CUresult cuLinkCreate(unsigned, CUjit_option *, void **, CUlinkState *state) { return give_handle(state); }

EXPORT CUresult cuLinkAddData(CUlinkState, CUjitInputType, void *, size_t, const char *, unsigned, CUjit_option *,
                              void **) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLinkComplete(CUlinkState, void **, size_t *) { return CUDA_ERROR_NOT_SUPPORTED; }

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction, int, size_t) {
  *count = 2;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction, const CUlaunchConfig *) {
  *count = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                       const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                       CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               CUstream stream, void **, void **) {
  launched(stream);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction, void **, void **) {
  launched(config->hStream);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                          unsigned, CUstream stream, void **) {
  launched(stream);
  return CUDA_SUCCESS;
}

// --- NVML, whose header is no part of the toolkit's wheels: 0 is success, a device is any pointer ---

struct NvmlMemory {
  unsigned long long total, free, used;
};

EXPORT int nvmlInit() { return 0; }

EXPORT int nvmlInit_v2() { return 0; }

EXPORT int nvmlShutdown() { return 0; }

EXPORT const char *nvmlErrorString(int) { return "an error of the rehearsal GPU's NVML"; }

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
  *count = 1;
  return 0;
}

EXPORT int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned, void **device) {
  *device = reinterpret_cast<void *>(1);
  return 0;
}

EXPORT int nvmlDeviceGetHandleByIndex(unsigned i, void **device) { return nvmlDeviceGetHandleByIndex_v2(i, device); }

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **device) {
  return nvmlDeviceGetHandleByIndex_v2(0, device);
}

EXPORT int nvmlDeviceGetComputeRunningProcesses(void *, unsigned *count, void *) {
  *count = 0;
  return 0;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  *version = kCudaVersion;
  return 0;
}

EXPORT int nvmlDeviceGetName(void *, char *name, unsigned size) {
  snprintf(name, size, "%s", kName);
  return 0;
}

EXPORT int nvmlDeviceGetUUID(void *, char *uuid, unsigned size) {
  snprintf(uuid, size, "%s", kUuid);
  return 0;
}

EXPORT int nvmlDeviceGetMemoryInfo(void *, NvmlMemory *memory) {
  *memory = {kTotalMemory, kTotalMemory - kContextMemory, kContextMemory};
  return 0;
}

// PyTorch looks these up together with the others, and none is needed for one device.

constexpr int kNvmlNotSupported = 3;

EXPORT int nvmlDeviceGetHandleByUUID(const char *, void **) { return kNvmlNotSupported; }

EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(void *, unsigned, int *) { return kNvmlNotSupported; }

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *, unsigned, void *) { return kNvmlNotSupported; }

EXPORT int nvmlDeviceGetP2PStatus(void *, void *, int, int *) { return kNvmlNotSupported; }

EXPORT int nvmlDeviceGetGpuFabricInfoV(void *, void *) { return kNvmlNotSupported; }
