// In the place of CUDA's runtime (libcudart), second half: streams, graphs, events and kernels.
//
// Kernels do nothing, but for those of libcudart_kernels.cpp where kernels compute. Streams are numbers, since whatever
// is asked for has already happened; events keep the host's clock. A captured graph is a number too, and capturing is a
// state of the process, not of a stream.

#include "null_gpu.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

struct Launch {
    dim3 grid, block;
    size_t shared;
    void* stream;
};

std::mutex guard;
std::atomic<uintptr_t> handles{1 << 16};
std::atomic<bool> capturing{false};
std::atomic<unsigned long long> captures{0};
thread_local Launch pushed;

// Made at the first use and never destroyed: libraries register their kernels before this one begins.
std::unordered_map<const void*, std::string>& kernels() {
    static auto* kept = new std::unordered_map<const void*, std::string>;
    return *kept;
}

const char* name_of(const void* kernel) {
    std::lock_guard<std::mutex> hold(guard);
    auto found = kernels().find(kernel);
    return found == kernels().end() ? "?" : found->second.c_str();
}

cudaError_t launched(const void* kernel, dim3 grid, dim3 block, void** arguments) {
    const char* name = name_of(kernel);
    null_gpu_note("kernel %u %u %u %u %s", grid.x, grid.y, grid.z, block.x * block.y * block.z, name);
    int computed = null_gpu_computes() ? null_gpu_kernel(name, grid.x, arguments) : 0;
    if (computed) return computed > 0 ? cudaSuccess : cudaErrorLaunchFailure;
    return null_gpu_hole(name) ? cudaErrorLaunchFailure : cudaSuccess;
}

template <class Handle>
cudaError_t number(Handle* out) {
    *out = reinterpret_cast<Handle>(handles += 64);
    return cudaSuccess;
}

}  // namespace

extern "C" {

// Streams, graphs and events

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return number(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return number(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return number(stream); }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
    call(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) {
    call(data);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    capturing = true;
    captures++;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    capturing = false;
    return number(graph);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                     const cudaGraphEdgeData** edges, size_t* count) {
    if (id) *id = captures;
    if (graph) *graph = reinterpret_cast<cudaGraph_t>(64);
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
    return number(graph);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    null_gpu_note("graph");
    return null_gpu_hole("a replayed graph") ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
    *count = 1;  // of none torch warns
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new timespec{});
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete reinterpret_cast<timespec*>(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    clock_gettime(CLOCK_MONOTONIC, reinterpret_cast<timespec*>(event));
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    auto* from = reinterpret_cast<timespec*>(start);
    auto* to = reinterpret_cast<timespec*>(end);
    double seconds = static_cast<double>(to->tv_sec - from->tv_sec) + (to->tv_nsec - from->tv_nsec) / 1e9;
    *milliseconds = static_cast<float>(1e3 * seconds);
    return cudaSuccess;
}

// Kernels: what nvcc's stubs call before main to name them, and to launch them

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(null_gpu_handle()); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
    std::lock_guard<std::mutex> hold(guard);
    kernels()[kernel] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<void**>(stream) = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* kernel) {
    *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    return launched(kernel, grid, block, arguments);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    return launched(kernel, grid, block, arguments);
}

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    return launched(kernel, grid, block, arguments);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
    return launched(kernel, config->gridDim, config->blockDim, arguments);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    out->ptxVersion = out->binaryVersion = 90;
    out->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
    *count = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
    *count = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
    *count = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void*, const cudaLaunchConfig_t*) {
    *size = 8;
    return cudaSuccess;
}

// The driver's newest function of a name, as the driver itself gives it out; one that is not known is empty.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *out = nullptr;
    for (const char* version : {"_v4", "_v3", "_v2", ""}) {
        if (driver && !*out) *out = dlsym(driver, (std::string(name) + version).c_str());
    }
    if (driver && !*out) *out = dlsym(driver, "null_gpu_nothing");
    if (result) *result = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *out ? cudaSuccess : cudaErrorSymbolNotFound;
}

}  // extern "C"
