// In the place of CUDA's runtime (libcudart), first half: cards of an H200's description, memory and errors.
//
// Memory is the host's, mapped when it is touched: a card's 140 GiB cost nothing until somebody writes into them, and
// every pointer, size and limit is real. Copies and fills are made, up to 64 MiB between or in cards' memory.

#include "null_gpu.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

const size_t kMoved = 64 << 20;     // more would make the lazily mapped memory of large models real; who computes has it all
const size_t kAlignment = 2 << 20;  // the driver's
const size_t kPage = 4096;
const int kMostDevices = 64;

struct Block {
    size_t bytes;
    int device;
    cudaMemoryType kind;
    int shared;    // the number of its file where other processes may map it; 0 where they may not
    bool foreign;  // another process's, mapped here
};

// What a handle for other processes holds: where the file lies that is their memory too.
struct Handle {
    pid_t owner;
    int number;
    size_t bytes;
};
static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t), "a handle has 64 bytes");

std::recursive_mutex guard;
using Hold = std::lock_guard<std::recursive_mutex>;
size_t used[kMostDevices];
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
std::atomic<bool> holed{false};  // for good, as a card that a kernel failed on: callers of <<<>>> ask for it later
thread_local int replaced = 0;

// Made at the first use and never destroyed: other libraries free memory before and after ours.
std::map<uintptr_t, Block>& blocks() {
    static auto* kept = new std::map<uintptr_t, Block>;
    return *kept;
}

cudaError_t fail(cudaError_t error) {
    last = error;
    return error;
}

int devices() {
    const char* told = getenv("ORTHANT_NULL_GPU_DEVICES");
    int all = told ? atoi(told) : 1;
    if (all > kMostDevices) all = kMostDevices;
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return all;
    if (!*visible || *visible == '-' || !strcmp(visible, "NoDevFiles")) return 0;
    int listed = 1;
    for (const char* one = visible; *one; one++) listed += *one == ',';
    return listed < all ? listed : all;
}

size_t capacity() {
    const char* told = getenv("ORTHANT_NULL_GPU_GIB");
    return static_cast<size_t>((told ? atof(told) : 139.8) * (1ull << 30));
}

std::map<uintptr_t, Block>::iterator holder(const void* address) {
    auto next = blocks().upper_bound(reinterpret_cast<uintptr_t>(address));
    if (next == blocks().begin()) return blocks().end();
    auto found = std::prev(next);
    bool inside = reinterpret_cast<uintptr_t>(address) < found->first + found->second.bytes;
    return inside ? found : blocks().end();
}

bool on_card(const void* address) {
    Hold hold(guard);
    auto found = holder(address);
    return found != blocks().end() && found->second.kind == cudaMemoryTypeDevice;
}

cudaError_t take(void** out, size_t bytes, cudaMemoryType kind) {
    Hold hold(guard);
    size_t whole = bytes ? (bytes + kPage - 1) / kPage * kPage : kPage;
    *out = nullptr;
    if (kind == cudaMemoryTypeDevice && used[current] + whole > capacity()) return fail(cudaErrorMemoryAllocation);
    void* mapped = mmap(nullptr, whole + kAlignment, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    auto start = reinterpret_cast<uintptr_t>(mapped);
    uintptr_t aligned = (start + kAlignment - 1) / kAlignment * kAlignment;
    if (aligned > start) munmap(mapped, aligned - start);
    munmap(reinterpret_cast<void*>(aligned + whole), start + kAlignment - aligned);
    blocks()[aligned] = {whole, current, kind, 0, false};
    if (kind == cudaMemoryTypeDevice) used[current] += whole;
    *out = reinterpret_cast<void*>(aligned);
    null_gpu_note("allocated %zu kind %d", bytes, static_cast<int>(kind));
    return cudaSuccess;
}

cudaError_t give_back(void* start) {
    Hold hold(guard);
    if (!start) return cudaSuccess;
    auto found = blocks().find(reinterpret_cast<uintptr_t>(start));
    if (found == blocks().end() || found->second.foreign) return fail(cudaErrorInvalidValue);
    if (found->second.kind == cudaMemoryTypeDevice) used[found->second.device] -= found->second.bytes;
    munmap(start, found->second.bytes);
    blocks().erase(found);
    return cudaSuccess;
}

std::string shared_file(const Handle& handle) {
    const char* told = getenv("ORTHANT_NULL_GPU_EXCHANGE");
    return std::string(told ? told : "/dev/shm") + "/shared." + std::to_string(handle.owner) + "." +
           std::to_string(handle.number);
}

void* map_file(void* at, size_t bytes, int file) {
    int how = MAP_SHARED | (at ? MAP_FIXED : 0);
    void* mapped = mmap(at, bytes, PROT_READ | PROT_WRITE, how, file, 0);
    return mapped == MAP_FAILED ? nullptr : mapped;
}

// Puts a file under a block, with what the block holds: its address stays, and others may map the file.
bool share(uintptr_t start, const Block& block, const Handle& handle) {
    int file = open(shared_file(handle).c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
    if (file < 0) return false;
    void* again = ftruncate(file, block.bytes) ? nullptr : map_file(nullptr, block.bytes, file);
    if (again) {
        memcpy(again, reinterpret_cast<void*>(start), block.bytes);
        munmap(again, block.bytes);
    }
    bool done = again && map_file(reinterpret_cast<void*>(start), block.bytes, file);
    close(file);
    return done;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
    bool out_of_card = on_card(from), into_card = on_card(to);
    null_gpu_note("copy %zu %s %s", bytes, out_of_card ? "card" : "host", into_card ? "card" : "host");
    if (bytes <= kMoved || null_gpu_computes() || !out_of_card || !into_card) memmove(to, from, bytes);
    return holed ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t fill(void* start, int value, size_t bytes) {
    null_gpu_note("fill %zu", bytes);
    if (bytes <= kMoved || null_gpu_computes()) memset(start, value, bytes);
    return cudaSuccess;
}

FILE* opened() {
    static FILE* file = nullptr;
    static pid_t owner = 0;
    const char* path = getenv("ORTHANT_NULL_GPU_LOG");
    if (!path) return nullptr;
    if (owner != getpid()) {  // a process that forked writes into a file of its own
        file = fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "a");
        owner = getpid();
    }
    return file;
}

}  // namespace

extern "C" {

// What the other null libraries use

void null_gpu_note(const char* format, ...) {
    Hold hold(guard);
    FILE* file = opened();
    if (!file) return;
    va_list values;
    va_start(values, format);
    vfprintf(file, format, values);
    va_end(values);
    fputc('\n', file);
}

void null_gpu_complain(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fputs("null GPU: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
}

bool null_gpu_computes() {
    static const bool asked = getenv("ORTHANT_NULL_GPU_COMPUTE");
    return asked;
}

void null_gpu_replaced(int change) { replaced += change; }

bool null_gpu_hole(const char* what) {
    if (!null_gpu_computes() || replaced > 0) return false;
    null_gpu_complain("nothing computes what %s would", what);
    holed = true;
    return true;
}

void* null_gpu_handle() { return calloc(1, 256); }

bool null_gpu_block(const void* address, void** start, size_t* bytes) {
    Hold hold(guard);
    auto found = holder(address);
    if (found == blocks().end()) return false;
    *start = reinterpret_cast<void*>(found->first);
    *bytes = found->second.bytes;
    return true;
}

int null_gpu_attribute(int attribute) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 3201000;
        case cudaDevAttrGlobalMemoryBusWidth: return 6144;
        case cudaDevAttrL2CacheSize: return 62914560;
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrUnifiedAddressing: return 1;
        default: return 0;
    }
}

// Memory

cudaError_t cudaMalloc(void** out, size_t bytes) { return take(out, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return take(out, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) { return take(out, bytes, cudaMemoryTypeHost); }
cudaError_t cudaMallocHost(void** out, size_t bytes) { return take(out, bytes, cudaMemoryTypeHost); }
cudaError_t cudaFree(void* start) { return give_back(start); }
cudaError_t cudaFreeAsync(void* start, cudaStream_t) { return give_back(start); }
cudaError_t cudaFreeHost(void* start) { return give_back(start); }

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* out, void* address) {
    static int count = 0;
    Hold hold(guard);
    auto found = holder(address);
    if (found == blocks().end() || found->second.kind != cudaMemoryTypeDevice || found->second.foreign)
        return fail(cudaErrorInvalidValue);
    Block& block = found->second;
    Handle handle{getpid(), block.shared ? block.shared : ++count, block.bytes};
    if (!block.shared && !share(found->first, block, handle)) return fail(cudaErrorMapBufferObjectFailed);
    block.shared = handle.number;
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    null_gpu_note("shared %zu", block.bytes);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t told, unsigned) {
    Handle handle;
    memcpy(&handle, &told, sizeof handle);
    if (handle.owner == getpid()) return fail(cudaErrorDeviceUninitialized);  // as CUDA says it
    int file = open(shared_file(handle).c_str(), O_RDWR);
    *out = file < 0 ? nullptr : map_file(nullptr, handle.bytes, file);
    if (file >= 0) close(file);
    if (!*out) return fail(cudaErrorMapBufferObjectFailed);
    Hold hold(guard);
    blocks()[reinterpret_cast<uintptr_t>(*out)] = {handle.bytes, current, cudaMemoryTypeDevice, 0, true};
    null_gpu_note("opened %zu", handle.bytes);
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* start) {
    Hold hold(guard);
    auto found = blocks().find(reinterpret_cast<uintptr_t>(start));
    if (found == blocks().end() || !found->second.foreign) return fail(cudaErrorInvalidValue);
    munmap(start, found->second.bytes);
    blocks().erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    Hold hold(guard);
    *total = capacity();
    *free = capacity() - used[current];
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, bytes);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
    return copy(to, from, bytes);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    for (size_t row = 0; row < height; row++) {
        copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    }
    return cudaSuccess;
}

cudaError_t cudaMemset(void* start, int value, size_t bytes) { return fill(start, value, bytes); }
cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) { return fill(start, value, bytes); }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
    Hold hold(guard);
    memset(out, 0, sizeof *out);
    auto found = holder(address);
    if (found == blocks().end()) {
        out->type = cudaMemoryTypeUnregistered;
        out->device = -2;
        return cudaSuccess;
    }
    out->type = found->second.kind;
    out->device = found->second.device;
    out->devicePointer = const_cast<void*>(address);
    if (out->type == cudaMemoryTypeHost) out->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
    Hold hold(guard);
    static auto* places = new std::unordered_map<const void*, void*>;
    auto found = places->find(symbol);
    if (found == places->end()) {
        cudaError_t failed = take(out, kPage, cudaMemoryTypeDevice);
        if (failed) return failed;
        found = places->emplace(symbol, *out).first;
    }
    *out = found->second;
    return cudaSuccess;
}

// Cards

cudaError_t cudaGetDeviceCount(int* count) {
    *count = devices();
    return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int device) {
    snprintf(out, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = static_cast<cudaMemPool_t>(null_gpu_handle());
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    *static_cast<unsigned long long*>(value) = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = null_gpu_attribute(static_cast<int>(attribute));
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "NVIDIA H200");
    memset(&out->uuid, device + 1, sizeof out->uuid);
    out->pciBusID = device + 1;
    out->totalGlobalMem = capacity();
    out->totalConstMem = 65536;
    out->major = null_gpu_attribute(cudaDevAttrComputeCapabilityMajor);
    out->minor = null_gpu_attribute(cudaDevAttrComputeCapabilityMinor);
    out->multiProcessorCount = null_gpu_attribute(cudaDevAttrMultiProcessorCount);
    out->warpSize = null_gpu_attribute(cudaDevAttrWarpSize);
    out->maxThreadsPerBlock = null_gpu_attribute(cudaDevAttrMaxThreadsPerBlock);
    out->maxThreadsPerMultiProcessor = null_gpu_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    out->maxThreadsDim[0] = null_gpu_attribute(cudaDevAttrMaxBlockDimX);
    out->maxThreadsDim[1] = null_gpu_attribute(cudaDevAttrMaxBlockDimY);
    out->maxThreadsDim[2] = null_gpu_attribute(cudaDevAttrMaxBlockDimZ);
    out->maxGridSize[0] = null_gpu_attribute(cudaDevAttrMaxGridDimX);
    out->maxGridSize[1] = null_gpu_attribute(cudaDevAttrMaxGridDimY);
    out->maxGridSize[2] = null_gpu_attribute(cudaDevAttrMaxGridDimZ);
    out->sharedMemPerBlock = null_gpu_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    out->sharedMemPerBlockOptin = null_gpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    out->sharedMemPerMultiprocessor = null_gpu_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    out->regsPerBlock = null_gpu_attribute(cudaDevAttrMaxRegistersPerBlock);
    out->regsPerMultiprocessor = null_gpu_attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    out->memoryBusWidth = null_gpu_attribute(cudaDevAttrGlobalMemoryBusWidth);
    out->l2CacheSize = null_gpu_attribute(cudaDevAttrL2CacheSize);
    out->memPitch = 2147483647;
    out->textureAlignment = 512;
    out->texturePitchAlignment = 32;
    out->asyncEngineCount = 3;
    out->maxBlocksPerMultiProcessor = 32;
    out->reservedSharedMemPerBlock = 1024;
    out->canMapHostMemory = out->concurrentKernels = out->unifiedAddressing = out->streamPrioritiesSupported = 1;
    out->managedMemory = out->cooperativeLaunch = out->memoryPoolsSupported = out->clusterLaunch = 1;
    return cudaSuccess;
}

// Errors

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorSymbolNotFound: return "cudaErrorSymbolNotFound";
        case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
        default: return "cudaErrorUnknown";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(error);
}

cudaError_t cudaPeekAtLastError() { return holed ? cudaErrorLaunchFailure : last; }

cudaError_t cudaGetLastError() {
    cudaError_t error = cudaPeekAtLastError();
    last = cudaSuccess;
    return error;
}

cudaError_t cudaDeviceSynchronize() {
    Hold hold(guard);
    if (FILE* file = opened()) fflush(file);
    return holed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // extern "C"
