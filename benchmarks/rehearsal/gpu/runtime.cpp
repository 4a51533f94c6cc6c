// CUDA's runtime on a GPU whose kernels do nothing.
//
// These definitions are preloaded and take precedence over libcudart's; what is not defined here (registration of
// kernels, names of errors) is libcudart's own and works without a driver. Memory of the device is memory of the host
// that is reserved and not committed. Launches are counted. Waiting takes no time, because nothing ever runs, but every
// call in which the host would wait is recorded, and so is every call that a stream capture forbids.

#include "device.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace rehearsal;

namespace {

// --- the record ---

std::atomic<long long> kernel_launches{0};
std::atomic<long long> graph_launches{0};
std::atomic<long long> host_waits{0};
std::atomic<long long> refusals{0};

// Called as observer(kind, call, reason), kind "wait", "refused" or "memory"; a wait is refused if it returns nonzero.
using Observer = int (*)(const char *kind, const char *call, const char *reason);
std::atomic<Observer> observer{nullptr};

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

int observe(const char *kind, const char *call, const char *reason) {
  Observer current = observer.load();
  return current ? current(kind, call, reason) : 0;
}

// --- captures ---

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id owner;
  unsigned long long id;
  long long nodes = 0;
  bool broken = false;
};

struct Stream {
  Capture *capture = nullptr;
  int priority = 0;
};

struct Event {
  Capture *capture = nullptr;
  std::chrono::steady_clock::time_point recorded;
};

struct Graph {
  long long nodes;
};

std::mutex capture_mutex;
std::set<Capture *> captures;
unsigned long long capture_ids = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// The legacy stream and the per-thread one are the handles 0 to 2, and can't be captured here.
Stream *stream_of(cudaStream_t handle) {
  return reinterpret_cast<uintptr_t>(handle) > 2 ? reinterpret_cast<Stream *>(handle) : nullptr;
}

Capture *capture_of(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  return stream ? stream->capture : nullptr;
}

cudaError_t refuse(Capture *capture, const char *call, const char *reason) {
  capture->broken = true;
  refusals++;
  observe("refused", call, reason);
  return fail(cudaErrorStreamCaptureUnsupported);
}

// The capture for whose sake this thread may not make calls that could depend on it, by the rules given with
// cudaThreadExchangeStreamCaptureMode.
Capture *forbidding_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return nullptr;
  std::lock_guard<std::mutex> lock(capture_mutex);
  for (Capture *capture : captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    bool ours = capture->owner == std::this_thread::get_id();
    bool everyones = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (ours || everyones) return capture;
  }
  return nullptr;
}

cudaError_t check_unsafe(const char *call) {
  Capture *capture = forbidding_capture();
  return capture ? refuse(capture, call, "not allowed while a stream is captured") : cudaSuccess;
}

// --- memory ---

using Blocks = std::map<char *, size_t>;

std::mutex memory_mutex;
Blocks device_blocks;
Blocks pinned_blocks;
size_t allocated = 0;
size_t peak_allocated = 0;

bool contains(const Blocks &blocks, const void *pointer) {
  char *address = static_cast<char *>(const_cast<void *>(pointer));
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return false;
  auto block = std::prev(after);
  return address < block->first + block->second;
}

enum class Place { kDevice, kPinned, kPageable };

Place place_of(const void *pointer) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (contains(device_blocks, pointer)) return Place::kDevice;
  return contains(pinned_blocks, pointer) ? Place::kPinned : Place::kPageable;
}

cudaError_t allocate(void **pointer, size_t bytes, Blocks &blocks) {
  constexpr size_t kPage = 4096;
  size_t size = std::max<size_t>(1, (bytes + kPage - 1) / kPage) * kPage;
  bool on_device = &blocks == &device_blocks;
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (on_device && allocated + size > kTotalMemory - kContextMemory) {
    observe("memory", "cudaMalloc", "out of memory");
    return fail(cudaErrorMemoryAllocation);
  }
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  blocks[static_cast<char *>(memory)] = size;
  if (on_device) {
    allocated += size;
    peak_allocated = std::max(peak_allocated, allocated);
  }
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t release(void *pointer, Blocks &blocks) {
  if (pointer == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto block = blocks.find(static_cast<char *>(pointer));
  if (block == blocks.end()) return fail(cudaErrorInvalidValue);
  if (&blocks == &device_blocks) allocated -= block->second;
  munmap(block->first, block->second);
  blocks.erase(block);
  return cudaSuccess;
}

}  // namespace

// --- what device.h promises ---

void rehearsal::launched(CUstream stream) {
  kernel_launches++;
  if (Capture *capture = capture_of(stream)) capture->nodes++;
}

cudaError_t rehearsal::waits(const char *call, const char *reason) {
  host_waits++;
  return observe("wait", call, reason) ? fail(cudaErrorNotPermitted) : cudaSuccess;
}

cudaError_t rehearsal::copy(void *target, const void *source, size_t bytes, bool asynchronous, cudaStream_t stream) {
  const char *call = asynchronous ? "cudaMemcpyAsync" : "cudaMemcpy";
  Place to = place_of(target);
  Place from = place_of(source);
  Capture *capture = capture_of(stream);
  if (!asynchronous) {
    if (cudaError_t error = check_unsafe(call)) return error;
    if (cudaError_t error = waits(call, "copies while the host waits")) return error;
  } else if (capture && (to == Place::kPageable || from == Place::kPageable)) {
    return refuse(capture, call, "copies memory of the host that is not pinned");
  } else if (to == Place::kPageable) {
    if (cudaError_t error = waits(call, "copies to memory of the host that is not pinned")) return error;
  }
  if (capture) capture->nodes++;
  bool within_device = to == Place::kDevice && from == Place::kDevice;
  if (!within_device || bytes <= kLargestCopy) memmove(target, source, bytes);
  return cudaSuccess;
}

int rehearsal::attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrIntegrated: return 0;
    case cudaDevAttrPageableMemoryAccess: return 0;
    default: return 1;  // most of the others say whether the device can do something
  }
}

// --- for rehearsal/device.py ---

struct Counts {
  long long kernel_launches, graph_launches, host_waits, refusals, allocated, peak_allocated;
};

EXPORT void rehearsal_counts(Counts *counts) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  *counts = {kernel_launches, graph_launches, host_waits, refusals, (long long)allocated, (long long)peak_allocated};
}

EXPORT void rehearsal_observe(Observer given) { observer = given; }

// --- the device ---

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "%s", kName);
  properties->totalGlobalMem = kTotalMemory;
  properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  properties->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
  properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  properties->warpSize = attribute(cudaDevAttrWarpSize);
  properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  properties->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  for (int i = 0; i < 3; i++) {
    properties->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
    properties->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
  }
  properties->totalConstMem = attribute(cudaDevAttrTotalConstantMemory);
  properties->textureAlignment = attribute(cudaDevAttrTextureAlignment);
  properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
  properties->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  properties->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  properties->asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
  properties->canMapHostMemory = 1;
  properties->concurrentKernels = 1;
  properties->cooperativeLaunch = 1;
  properties->globalL1CacheSupported = 1;
  properties->managedMemory = 1;
  properties->memoryPoolsSupported = 1;
  properties->streamPrioritiesSupported = 1;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int) {
  snprintf(text, size, "%s", kPciBusId);
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize() {
  if (cudaError_t error = check_unsafe("cudaDeviceSynchronize")) return error;
  return waits("cudaDeviceSynchronize", "waits for the device");
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
  *can = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return fail(cudaErrorPeerAccessUnsupported); }

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }

EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

// A driver's function is this library's if it has it. Any other can be asked for, and fails when it is called.
static CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function == nullptr) *function = reinterpret_cast<void *>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- memory ---

EXPORT cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  if (cudaError_t error = check_unsafe("cudaMalloc")) return error;
  return allocate(pointer, bytes, device_blocks);
}

EXPORT cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes, device_blocks);
}

EXPORT cudaError_t cudaFree(void *pointer) {
  if (pointer == nullptr) return cudaSuccess;  // an idiom for opening the device
  if (cudaError_t error = check_unsafe("cudaFree")) return error;
  if (cudaError_t error = waits("cudaFree", "waits for the device before it frees memory")) return error;
  return release(pointer, device_blocks);
}

EXPORT cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer, device_blocks); }

EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  if (cudaError_t error = check_unsafe("cudaHostAlloc")) return error;
  return allocate(pointer, bytes, pinned_blocks);
}

EXPORT cudaError_t cudaFreeHost(void *pointer) {
  if (cudaError_t error = check_unsafe("cudaFreeHost")) return error;
  return release(pointer, pinned_blocks);
}

EXPORT cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  pinned_blocks[static_cast<char *>(pointer)] = bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void *pointer) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  pinned_blocks.erase(static_cast<char *>(pointer));
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  *total = kTotalMemory;
  *free = kTotalMemory - kContextMemory - allocated;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, cudaMemcpyKind) {
  return copy(target, source, bytes, false, nullptr);
}

EXPORT cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  return copy(target, source, bytes, true, stream);
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void *target, int, const void *source, int, size_t bytes, cudaStream_t stream) {
  return copy(target, source, bytes, true, stream);
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *target, int value, size_t bytes) {
  if (bytes <= kLargestCopy) memset(target, value, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t stream) {
  if (Capture *capture = capture_of(stream)) capture->nodes++;
  return cudaMemset(target, value, bytes);
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  Place place = place_of(pointer);
  attributes->type = place == Place::kDevice   ? cudaMemoryTypeDevice
                     : place == Place::kPinned ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
  if (place != Place::kPageable) attributes->devicePointer = const_cast<void *>(pointer);
  if (place == Place::kPinned) attributes->hostPointer = const_cast<void *>(pointer);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **pointer, const void *) {
  static char symbol[4096];
  *pointer = symbol;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(1);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) {
  *static_cast<unsigned long long *>(value) = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *) { return cudaSuccess; }

EXPORT cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc *, size_t) { return cudaSuccess; }

EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// --- streams ---

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int priority) {
  Stream *made = new Stream;
  made->priority = priority;
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // leaked: its handle may still be compared

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
  Stream *stream = stream_of(handle);
  *priority = stream ? stream->priority : 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  if (Capture *capture = capture_of(handle)) {
    return refuse(capture, "cudaStreamSynchronize", "waits for a stream that is captured");
  }
  if (cudaError_t error = check_unsafe("cudaStreamSynchronize")) return error;
  return waits("cudaStreamSynchronize", "waits for a stream");
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  if (Capture *capture = capture_of(handle)) {
    return refuse(capture, "cudaStreamQuery", "asks about a stream that is captured");
  }
  return check_unsafe("cudaStreamQuery");
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Stream *stream = stream_of(handle);
  Event *event = reinterpret_cast<Event *>(event_handle);
  if (stream && stream->capture && event->capture != stream->capture) {
    return refuse(stream->capture, "cudaStreamWaitEvent", "makes a captured stream wait for work that is not captured");
  }
  if (stream && event->capture) stream->capture = event->capture;  // the stream becomes a part of the capture
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  if (Capture *capture = capture_of(stream)) {
    capture->nodes++;
  } else {
    function(data);
  }
  return cudaSuccess;
}

// --- events ---

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event *>(event);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  Event *event = reinterpret_cast<Event *>(handle);
  event->capture = capture_of(stream);
  event->recorded = std::chrono::steady_clock::now();
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event *event = reinterpret_cast<Event *>(handle);
  if (event->capture) return refuse(event->capture, "cudaEventQuery", "asks about an event that is captured");
  return check_unsafe("cudaEventQuery");
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event *event = reinterpret_cast<Event *>(handle);
  if (event->capture) return refuse(event->capture, "cudaEventSynchronize", "waits for an event that is captured");
  if (cudaError_t error = check_unsafe("cudaEventSynchronize")) return error;
  return waits("cudaEventSynchronize", "waits for an event");
}

// The time that the host took between the records: the device takes none.
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  auto elapsed = reinterpret_cast<Event *>(end)->recorded - reinterpret_cast<Event *>(start)->recorded;
  *milliseconds = std::max(1e-3f, std::chrono::duration<float, std::milli>(elapsed).count());
  return cudaSuccess;
}

// --- capture and graphs ---

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream *stream = stream_of(handle);
  if (stream == nullptr || stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  std::lock_guard<std::mutex> lock(capture_mutex);
  stream->capture = new Capture{mode, std::this_thread::get_id(), ++capture_ids};
  captures.insert(stream->capture);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Capture *capture = capture_of(handle);
  if (capture == nullptr) return fail(cudaErrorIllegalState);
  stream_of(handle)->capture = nullptr;
  {
    std::lock_guard<std::mutex> lock(capture_mutex);
    captures.erase(capture);  // not deleted: events that were recorded in it point to it
  }
  if (capture->broken) {
    *graph = nullptr;
    return fail(cudaErrorStreamCaptureInvalidated);
  }
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{capture->nodes});
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                            size_t *count) {
  Capture *capture = capture_of(stream);
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph *>(graph)));
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  graph_launches++;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph *>(graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph *>(executable);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
  *count = reinterpret_cast<Graph *>(graph)->nodes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t *, cudaGraphEdgeData *, size_t *n) {
  *n = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char *, unsigned) { return cudaSuccess; }

// --- kernels ---

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  attributes->numRegs = 32;
  attributes->ptxVersion = 90;
  attributes->binaryVersion = 90;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int, size_t,
                                                                          unsigned) {
  *count = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *, int, size_t) {
  *count = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
  launched(stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *, void **) {
  launched(config->stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
  launched(stream);
  return cudaSuccess;
}

// What nvcc makes of kernel<<<grid, block, shared, stream>>>(...): push the configuration, pop it in a stub, launch.

struct Configuration {
  dim3 grid, block;
  size_t shared;
  CUstream_st *stream;
};

static thread_local Configuration pushed;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st *stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<CUstream_st **>(stream) = pushed.stream;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t stream) {
  launched(stream);
  return cudaSuccess;
}

// --- other processes, of which there are none ---

EXPORT cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *) {
  memset(handle, 0, sizeof *handle);
  return cudaSuccess;
}
