// In the place of libcudnn and its parts: graphs of operations that are accepted whatever they say.
//
// Heuristics give one plan that needs no workspace; running it is noted. That a card has a kernel for a graph (of fused
// attention, above all) is not decided here: it is said of all.

#include "null_gpu.h"

#include <cudnn.h>

#include <cstring>

namespace {

size_t width(cudnnBackendAttributeType_t type) {
    switch (type) {
        case CUDNN_TYPE_INT64: return sizeof(int64_t);
        case CUDNN_TYPE_INT32: return sizeof(int32_t);
        default: return 0;
    }
}

}  // namespace

extern "C" {

size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }

cudnnStatus_t cudnnGetProperty(libraryPropertyType property, int* value) {
    const int versions[] = {CUDNN_MAJOR, CUDNN_MINOR, CUDNN_PATCHLEVEL};
    *value = versions[property];
    return CUDNN_STATUS_SUCCESS;
}

const char* cudnnGetErrorString(cudnnStatus_t status) { return status ? "an error" : "CUDNN_STATUS_SUCCESS"; }

void cudnnGetLastErrorString(char* out, size_t size) {
    if (size) *out = 0;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
    *handle = static_cast<cudnnHandle_t>(null_gpu_handle());
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t, cudaStream_t* stream) {
    *stream = nullptr;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* out) {
    *out = static_cast<cudnnBackendDescriptor_t>(null_gpu_handle());
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t wanted, int64_t* count, void* out) {
    size_t bytes = width(type);
    if (bytes && out && wanted > 0) memset(out, 0, bytes * wanted);
    if (count) *count = name == CUDNN_ATTR_ENGINEHEUR_RESULTS || (bytes && out && wanted > 0);
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
    null_gpu_note("cudnn");
    return null_gpu_hole("a graph of cuDNN's") ? CUDNN_STATUS_NOT_SUPPORTED : CUDNN_STATUS_SUCCESS;
}

}  // extern "C"
