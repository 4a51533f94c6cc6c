// cuBLAS, cuDNN and NCCL, as far as PyTorch uses them for matrix products, convolutions, attention and a world of one
// process. The libraries themselves would want a driver that runs kernels. Each call that would launch kernels counts
// as one launch.

#include "device.h"

#include <cublasLt.h>
#include <cudnn.h>
#include <nccl.h>

#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace rehearsal;

namespace {

// What a handle of cuBLAS or cuDNN points to.
struct Handle {
  cudaStream_t stream = nullptr;
};

template <typename Given>
Handle *handle_of(Given handle) {
  return reinterpret_cast<Handle *>(handle);
}

}  // namespace

// --- cuBLAS ---

EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  *handle = reinterpret_cast<cublasHandle_t>(new Handle);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  handle_of(handle)->stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}

// Products differ in arguments of which only the handle matters here. A function that is called with more arguments
// than it reads is well-behaved under the calling conventions of x86-64 and ARM. The assembler's name is the library's,
// because its header declares that one with all arguments.
#define PRODUCT(name)                                                           \
  EXPORT cublasStatus_t product_##name(cublasHandle_t, ...) __asm__(#name);     \
  EXPORT cublasStatus_t product_##name(cublasHandle_t handle, ...) {            \
    launched(handle_of(handle)->stream);                                        \
    return CUBLAS_STATUS_SUCCESS;                                               \
  }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                     cublasLtMatmulHeuristicResult_t *results, int *count) {
  memset(results, 0, sizeof *results);
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *,
                                     cublasLtMatrixLayout_t, const void *, cublasLtMatrixLayout_t, const void *,
                                     const void *, cublasLtMatrixLayout_t, void *, cublasLtMatrixLayout_t,
                                     const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t stream) {
  launched(stream);
  return CUBLAS_STATUS_SUCCESS;
}

// --- cuDNN's graph interface: every operation has one plan, which needs no workspace ---

EXPORT cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
  *handle = reinterpret_cast<cudnnHandle_t>(new Handle);
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnDestroy(cudnnHandle_t) { return CUDNN_STATUS_SUCCESS; }

EXPORT cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  handle_of(handle)->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
  *stream = handle_of(handle)->stream;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t *descriptor) {
  *descriptor = new char;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  delete static_cast<char *>(descriptor);
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t,
                                              cudnnBackendAttributeType_t, int64_t, const void *) {
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }

EXPORT cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name,
                                              cudnnBackendAttributeType_t type, int64_t requested, int64_t *count,
                                              void *elements) {
  bool lists_properties = name == CUDNN_ATTR_ENGINE_NUMERICAL_NOTE || name == CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE ||
                          name == CUDNN_ATTR_ENGINE_KNOB_INFO || name == CUDNN_ATTR_ENGINECFG_KNOB_CHOICES;
  int64_t found = lists_properties ? 0 : 1;
  if (count) *count = found;
  if (found && elements && requested > 0) {  // sizes of workspaces and of shared memory, numbers of engines
    if (type == CUDNN_TYPE_INT64) *static_cast<int64_t *>(elements) = 0;
    if (type == CUDNN_TYPE_INT32) *static_cast<int32_t *>(elements) = 0;
  }
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
  launched(handle_of(handle)->stream);
  return CUDNN_STATUS_SUCCESS;
}

// --- NCCL in a world of one process, where every collective is a copy of what is given ---

static ncclResult_t begin(ncclComm_t *communicator) {
  *communicator = reinterpret_cast<ncclComm_t>(1);
  return ncclSuccess;
}

static ncclResult_t collective(const void *source, void *target, size_t count, ncclDataType_t type,
                               cudaStream_t stream) {
  size_t size = 2;
  if (type == ncclInt8 || type == ncclUint8) size = 1;
  if (type == ncclInt32 || type == ncclUint32 || type == ncclFloat32) size = 4;
  if (type == ncclInt64 || type == ncclUint64 || type == ncclFloat64) size = 8;
  launched(stream);
  if (source != target) copy(target, source, count * size, true, stream);
  return ncclSuccess;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 0, sizeof *id);
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *comm, int, ncclUniqueId, int) { return begin(comm); }

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int, ncclUniqueId, int, ncclConfig_t *) {
  return begin(comm);
}

EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int, int, int, ncclUniqueId *, ncclConfig_t *) {
  return begin(comm);
}

EXPORT ncclResult_t ncclCommSplit(ncclComm_t, int, int, ncclComm_t *comm, ncclConfig_t *) { return begin(comm); }

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *error) {
  *error = ncclSuccess;
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommCount(const ncclComm_t, int *count) {
  *count = 1;
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t, int *rank) {
  *rank = 0;
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }

EXPORT ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }

EXPORT ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }

EXPORT ncclResult_t ncclGroupStart() { return ncclSuccess; }

EXPORT ncclResult_t ncclGroupEnd() { return ncclSuccess; }

EXPORT ncclResult_t ncclAllReduce(const void *source, void *target, size_t count, ncclDataType_t type, ncclRedOp_t,
                                  ncclComm_t, cudaStream_t stream) {
  return collective(source, target, count, type, stream);
}

EXPORT ncclResult_t ncclReduce(const void *source, void *target, size_t count, ncclDataType_t type, ncclRedOp_t, int,
                               ncclComm_t, cudaStream_t stream) {
  return collective(source, target, count, type, stream);
}

EXPORT ncclResult_t ncclBroadcast(const void *source, void *target, size_t count, ncclDataType_t type, int, ncclComm_t,
                                  cudaStream_t stream) {
  return collective(source, target, count, type, stream);
}

EXPORT ncclResult_t ncclBcast(void *target, size_t count, ncclDataType_t type, int, ncclComm_t, cudaStream_t stream) {
  return collective(target, target, count, type, stream);
}

EXPORT ncclResult_t ncclAllGather(const void *source, void *target, size_t count, ncclDataType_t type, ncclComm_t,
                                  cudaStream_t stream) {
  return collective(source, target, count, type, stream);
}

EXPORT ncclResult_t ncclReduceScatter(const void *source, void *target, size_t count, ncclDataType_t type, ncclRedOp_t,
                                      ncclComm_t, cudaStream_t stream) {
  return collective(source, target, count, type, stream);
}
