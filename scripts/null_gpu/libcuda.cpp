// In the place of the driver (libcuda): what torch, Transformer Engine, NCCL's callers and Triton ask it directly.
//
// One context for everybody. Modules and libraries are loaded without being read, and launches of their kernels do
// nothing. Every other function that cuda.h declares is there and empty.

#include "null_gpu.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <string>

// The header renames these to their newest versions; here both names are written.
#undef cuGetProcAddress
#undef cuStreamGetCaptureInfo

namespace {

CUcontext context() {
    static void* kept = null_gpu_handle();
    return static_cast<CUcontext>(kept);
}

template <class Handle>
CUresult handle(Handle* out) {
    *out = static_cast<Handle>(null_gpu_handle());
    return CUDA_SUCCESS;
}

template <class Handle>
CUresult named(Handle* out, const char* name) {
    *out = reinterpret_cast<Handle>(new std::string(name));
    return CUDA_SUCCESS;
}

CUresult answer(cudaError_t error) { return static_cast<CUresult>(error); }  // the numbers are the same

}  // namespace

extern "C" {

CUresult null_gpu_nothing() { return CUDA_SUCCESS; }

// Cards and contexts

CUresult cuDriverGetVersion(int* version) { return answer(cudaDriverGetVersion(version)); }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) { return answer(cudaGetDeviceCount(count)); }

CUresult cuDeviceGetName(char* out, int size, CUdevice) {
    snprintf(out, size, "NVIDIA H200");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = null_gpu_attribute(static_cast<int>(attribute));
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    size_t free;
    return answer(cudaMemGetInfo(&free, bytes));
}

CUresult cuCtxGetCurrent(CUcontext* out) {
    *out = context();
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* out) {
    if (out) *out = context();
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v4(CUcontext* out, CUctxCreateParams*, unsigned, CUdevice) { return cuCtxGetCurrent(out); }
CUresult cuStreamGetCtx(CUstream, CUcontext* out) { return cuCtxGetCurrent(out); }
CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice) { return cuCtxGetCurrent(out); }
CUresult cuCtxGetDevice(CUdevice* device) { return answer(cudaGetDevice(device)); }

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = cudaGetErrorName(static_cast<cudaError_t>(error));
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = cudaGetErrorString(static_cast<cudaError_t>(error));
    return CUDA_SUCCESS;
}

// Memory

CUresult cuPointerGetAttribute(void* out, CUpointer_attribute attribute, CUdeviceptr address) {
    cudaPointerAttributes known;
    cudaPointerGetAttributes(&known, reinterpret_cast<void*>(address));
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            if (known.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
            *static_cast<unsigned*>(out) =
                known.type == cudaMemoryTypeDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(out) = address; break;
        case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(out) = context(); break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(out) = known.device; break;
        default: *static_cast<unsigned long long*>(out) = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
    void* begin;
    size_t size;
    if (!null_gpu_block(reinterpret_cast<void*>(address), &begin, &size)) return CUDA_ERROR_NOT_FOUND;
    if (start) *start = reinterpret_cast<CUdeviceptr>(begin);
    if (bytes) *bytes = size;
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return answer(cudaMemcpy(to, reinterpret_cast<void*>(from), bytes, cudaMemcpyDeviceToHost));
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return answer(cudaMemcpy(reinterpret_cast<void*>(to), from, bytes, cudaMemcpyHostToDevice));
}

// Kernels

CUresult cuModuleLoad(CUmodule* module, const char*) { return handle(module); }
CUresult cuModuleLoadData(CUmodule* module, const void*) { return handle(module); }

CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) { return handle(module); }

CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
    return handle(library);
}

CUresult cuModuleGetFunction(CUfunction* kernel, CUmodule, const char* name) { return named(kernel, name); }
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) { return named(kernel, name); }

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                  : 0;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned, CUstream, void**, void**) {
    const char* name = reinterpret_cast<std::string*>(kernel)->c_str();
    null_gpu_note("kernel %u %u %u %u %s", x, y, z, block_x * block_y * block_z, name);
    return null_gpu_hole(name) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction kernel, void** values, void** extra) {
    return cuLaunchKernel(kernel, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                          config->blockDimY, config->blockDimZ, 0, nullptr, values, extra);
}

CUresult cuLaunchCooperativeKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x,
                                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                                   void** values) {
    return cuLaunchKernel(kernel, x, y, z, block_x, block_y, block_z, shared, stream, values, nullptr);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
    *count = 2;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
    *count = 2;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

// Streams

CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t*, CUgraph*,
                                   const CUgraphNode**, size_t*) {
    cudaStreamCaptureStatus known;
    cudaStreamIsCapturing(stream, &known);
    *status = static_cast<CUstreamCaptureStatus>(known);
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                   const CUgraphNode** nodes, const CUgraphEdgeData**, size_t* count) {
    return cuStreamGetCaptureInfo_v2(stream, status, id, graph, nodes, count);
}

// Names

CUresult cuGetProcAddress_v2(const char* name, void** out, int version, cuuint64_t,
                             CUdriverProcAddressQueryResult* result) {
    cudaError_t failed = cudaGetDriverEntryPointByVersion(name, out, version, 0, nullptr);
    if (result) *result = failed ? CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND : CU_GET_PROC_ADDRESS_SUCCESS;
    return failed ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char* name, void** out, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}

}  // extern "C"
