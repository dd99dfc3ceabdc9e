// In the place of libcublas and libcublasLt, from this one file: products that are noted and not computed.
//
// cublasLt's matrices are held against each other: a product whose inner sizes differ fails. Leading dimensions,
// scales, types and epilogues are taken as they come.

#include "null_gpu.h"

#include <cublasLt.h>
#include <cublas_v2.h>

#include <cstring>

namespace {

struct Layout {
    cudaDataType type;
    long rows, columns;
};

struct Product {
    cublasComputeType_t compute;
    cublasOperation_t first = CUBLAS_OP_N, second = CUBLAS_OP_N;
};

cublasStatus_t done(const char* call, long rows, long columns, long inner, int first, int second, int out, int compute,
                    int batch) {
    null_gpu_note("product %ld %ld %ld batch %d types %d %d %d compute %d %s", rows, columns, inner, batch, first,
                  second, out, compute, call);
    return null_gpu_hole(call) ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
}

const Layout& layout(cublasLtMatrixLayout_t opaque) { return *reinterpret_cast<const Layout*>(opaque); }

}  // namespace

extern "C" {

// cuBLAS

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = static_cast<cublasHandle_t>(null_gpu_handle());
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int* version) {
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

const char* cublasGetStatusName(cublasStatus_t status) { return status ? "an error" : "CUBLAS_STATUS_SUCCESS"; }
const char* cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const float*,
                              const float*, int, const float*, int, const float*, float*, int) {
    return done("Sgemm", m, n, k, CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 1);
}

cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void*,
                            const void*, cudaDataType first, int, const void*, cudaDataType second, int, const void*,
                            void*, cudaDataType out, int, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return done("GemmEx", m, n, k, first, second, out, compute, 1);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                          const void*, const void*, cudaDataType first, int, long long, const void*,
                                          cudaDataType second, int, long long, const void*, void*, cudaDataType out,
                                          int, long long, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return done("GemmStridedBatchedEx", m, n, k, first, second, out, compute, batch);
}

// cuBLASLt

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = static_cast<cublasLtHandle_t>(null_gpu_handle());
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t compute, cudaDataType_t) {
    *out = reinterpret_cast<cublasLtMatmulDesc_t>(new Product{compute});
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    delete reinterpret_cast<Product*>(description);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value, size_t) {
    auto* product = reinterpret_cast<Product*>(description);
    if (attribute == CUBLASLT_MATMUL_DESC_TRANSA) memcpy(&product->first, value, sizeof product->first);
    if (attribute == CUBLASLT_MATMUL_DESC_TRANSB) memcpy(&product->second, value, sizeof product->second);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
    *out = static_cast<cublasLtMatmulPreference_t>(null_gpu_handle());
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t) {
    *out = reinterpret_cast<cublasLtMatrixLayout_t>(
        new Layout{type, static_cast<long>(rows), static_cast<long>(columns)});
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t opaque) {
    delete reinterpret_cast<Layout*>(opaque);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* out,
                                              int* count) {
    memset(out, 0, sizeof *out);
    out->state = CUBLAS_STATUS_SUCCESS;
    out->wavesCount = 1;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void*, const void*,
                              cublasLtMatrixLayout_t first_layout, const void*, cublasLtMatrixLayout_t second_layout,
                              const void*, const void*, cublasLtMatrixLayout_t, void*,
                              cublasLtMatrixLayout_t out_layout, const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t) {
    const auto& product = *reinterpret_cast<const Product*>(description);
    const Layout &first = layout(first_layout), &second = layout(second_layout), &out = layout(out_layout);
    long inner = product.first == CUBLAS_OP_N ? first.columns : first.rows;
    long others = product.second == CUBLAS_OP_N ? second.rows : second.columns;
    if (inner != others) {
        null_gpu_complain("cublasLtMatmul: inner sizes %ld and %ld", inner, others);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    return done("LtMatmul", out.rows, out.columns, inner, first.type, second.type, out.type, product.compute, 1);
}

}  // extern "C"
