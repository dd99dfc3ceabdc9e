// In the place of libcublas and libcublasLt, from these files for both: products are noted, and computed where that is
// asked for (libcublas_products.cpp).
//
// cublasLt's matrices are held against each other: a product whose inner sizes differ fails. What is not computed takes
// leading dimensions, scales, types and epilogues as they come; what is, refuses those that it does not know.

#include "null_gpu.h"
#include "products.h"

#include <cublasLt.h>
#include <cublas_v2.h>

#include <cstdlib>
#include <cstring>

namespace {

struct Layout {
    cudaDataType type;
    long rows, columns, leading;
    int batch = 1;
    long stride = 0;
};

struct Description {
    cublasComputeType_t compute;
    cublasOperation_t first = CUBLAS_OP_N, second = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void* bias = nullptr;
    int bias_type = -1;  // the output's
    void* aux = nullptr;
    int aux_type = -1;
    int64_t aux_leading = 0;
    void *first_scale = nullptr, *second_scale = nullptr, *out_scale = nullptr, *out_amax = nullptr;
    int first_scaling = 0, second_scaling = 0;
    bool unknown = false;  // something was asked for that is not computed
};

long sizes_of(cudaDataType type) {
    switch (type) {
        case CUDA_R_32F: return 4;
        case CUDA_R_16F:
        case CUDA_R_16BF: return 2;
        default: return 1;
    }
}

// cuBLAS's own switch: 0 keeps float32's precision in products that may have TF32's.
bool tf32_is_off() {
    const char* told = getenv("NVIDIA_TF32_OVERRIDE");
    return told && !strcmp(told, "0");
}

// Notes a product, and computes it where it should be: `first` to `out` as many times as `batch` says.
cublasStatus_t product(const char* call, Multiplication asked, int compute, int batch = 1,
                       const long (&strides)[3] = {0, 0, 0}) {
    null_gpu_note("product %ld %ld %ld batch %d types %d %d %d compute %d %s", asked.m, asked.n, asked.k, batch,
                  asked.first.type, asked.second.type, asked.out_type, compute, call);
    if (!null_gpu_computes()) return CUBLAS_STATUS_SUCCESS;
    asked.tf32 = asked.tf32 && !tf32_is_off();
    for (int at = 0; at < batch; at++) {
        if (!null_gpu_multiply(asked)) return CUBLAS_STATUS_NOT_SUPPORTED;
        asked.first.data = static_cast<const char*>(asked.first.data) + strides[0];
        asked.second.data = static_cast<const char*>(asked.second.data) + strides[1];
        asked.out = static_cast<char*>(asked.out) + strides[2];
        asked.added = asked.added ? static_cast<const char*>(asked.added) + strides[2] : nullptr;
    }
    return CUBLAS_STATUS_SUCCESS;
}

const Layout& layout(cublasLtMatrixLayout_t opaque) { return *reinterpret_cast<const Layout*>(opaque); }

// cuBLAS's own: alpha, beta and C as it gives them, which are float32 but in float16's arithmetic.
Multiplication plain(cublasOperation_t first, cublasOperation_t second, int m, int n, int k, const void* alpha,
                     const void* a, cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb,
                     const void* beta, void* c, cudaDataType c_type, int ldc, bool tf32) {
    Multiplication asked;
    asked.m = m, asked.n = n, asked.k = k;
    asked.first.data = a, asked.first.type = a_type, asked.first.leading = lda;
    asked.first.transposed = first != CUBLAS_OP_N;
    asked.second.data = b, asked.second.type = b_type, asked.second.leading = ldb;
    asked.second.transposed = second != CUBLAS_OP_N;
    asked.alpha = *static_cast<const float*>(alpha), asked.beta = *static_cast<const float*>(beta);
    asked.tf32 = tf32;
    asked.added = asked.out = c;
    asked.added_type = asked.out_type = c_type;
    asked.added_leading = asked.out_leading = ldc;
    return asked;
}

Factor factor(const Layout& laid, const void* data, cublasOperation_t operation, const void* scale, int scaling) {
    Factor found;
    found.data = data, found.type = laid.type, found.leading = laid.leading;
    found.transposed = operation != CUBLAS_OP_N;
    found.scale = scale;
    if (scaling == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F) found.scaling = Factor::kVectors;
    if (scaling == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F) found.scaling = Factor::kBlocks;
    return found;
}

bool set_epilogue(const Description& said, cudaDataType out, Multiplication* asked) {
    asked->bias_data = said.bias, asked->aux = said.aux, asked->aux_leading = said.aux_leading;
    asked->bias_type = said.bias_type < 0 ? out : static_cast<cudaDataType>(said.bias_type);
    asked->aux_type = said.aux_type < 0 ? out : static_cast<cudaDataType>(said.aux_type);
    using M = Multiplication;
    const struct { cublasLtEpilogue_t name; M::Activation activation; M::Bias bias; bool aux; } kinds[] = {
        {CUBLASLT_EPILOGUE_DEFAULT, M::kIdentity, M::kNone, false},
        {CUBLASLT_EPILOGUE_BIAS, M::kIdentity, M::kAdded, false},
        {CUBLASLT_EPILOGUE_RELU, M::kRelu, M::kNone, false},
        {CUBLASLT_EPILOGUE_RELU_BIAS, M::kRelu, M::kAdded, false},
        {CUBLASLT_EPILOGUE_GELU, M::kGelu, M::kNone, false},
        {CUBLASLT_EPILOGUE_GELU_BIAS, M::kGelu, M::kAdded, false},
        {CUBLASLT_EPILOGUE_GELU_AUX, M::kGelu, M::kNone, true},
        {CUBLASLT_EPILOGUE_GELU_AUX_BIAS, M::kGelu, M::kAdded, true},
        {CUBLASLT_EPILOGUE_DGELU, M::kGeluBackward, M::kNone, true},
        {CUBLASLT_EPILOGUE_DGELU_BGRAD, M::kGeluBackward, M::kSumOfOut, true},
        {CUBLASLT_EPILOGUE_BGRADA, M::kIdentity, M::kSumOfFirst, false},
        {CUBLASLT_EPILOGUE_BGRADB, M::kIdentity, M::kSumOfSecond, false},
    };
    for (const auto& kind : kinds) {
        if (kind.name != said.epilogue) continue;
        asked->activation = kind.activation, asked->bias = kind.bias;
        if (!kind.aux) asked->aux = nullptr;
        return true;
    }
    null_gpu_complain("cublasLtMatmul: nothing computes epilogue %d", static_cast<int>(said.epilogue));
    return false;
}

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

cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t first, cublasOperation_t second, int m, int n, int k,
                              const float* alpha, const float* a, int lda, const float* b, int ldb, const float* beta,
                              float* c, int ldc) {
    return product("Sgemm", plain(first, second, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c,
                                  CUDA_R_32F, ldc, false), CUBLAS_COMPUTE_32F);
}

cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t first, cublasOperation_t second, int m, int n, int k,
                            const void* alpha, const void* a, cudaDataType a_type, int lda, const void* b,
                            cudaDataType b_type, int ldb, const void* beta, void* c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
    return product("GemmEx", plain(first, second, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc,
                                   compute == CUBLAS_COMPUTE_32F_FAST_TF32), compute);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t first, cublasOperation_t second, int m,
                                          int n, int k, const void* alpha, const void* a, cudaDataType a_type, int lda,
                                          long long a_stride, const void* b, cudaDataType b_type, int ldb,
                                          long long b_stride, const void* beta, void* c, cudaDataType c_type, int ldc,
                                          long long c_stride, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t) {
    const long width = sizes_of(a_type), other = sizes_of(b_type), out = sizes_of(c_type);
    return product("GemmStridedBatchedEx",
                   plain(first, second, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc,
                         compute == CUBLAS_COMPUTE_32F_FAST_TF32),
                   compute, batch, {a_stride * width, b_stride * other, c_stride * out});
}

// cuBLASLt

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = static_cast<cublasLtHandle_t>(null_gpu_handle());
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t compute, cudaDataType_t) {
    *out = reinterpret_cast<cublasLtMatmulDesc_t>(new Description{compute});
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    delete reinterpret_cast<Description*>(description);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              size_t bytes) {
    auto& said = *reinterpret_cast<Description*>(description);
    void* places[] = {&said.first,       &said.second,       &said.epilogue,    &said.bias,       &said.bias_type,
                      &said.aux,         &said.aux_type,     &said.aux_leading, &said.first_scale, &said.second_scale,
                      &said.out_scale,   &said.out_amax,     &said.first_scaling, &said.second_scaling};
    const cublasLtMatmulDescAttributes_t names[] = {
        CUBLASLT_MATMUL_DESC_TRANSA,          CUBLASLT_MATMUL_DESC_TRANSB,
        CUBLASLT_MATMUL_DESC_EPILOGUE,        CUBLASLT_MATMUL_DESC_BIAS_POINTER,
        CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
        CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
        CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
        CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, CUBLASLT_MATMUL_DESC_AMAX_D_POINTER,
        CUBLASLT_MATMUL_DESC_A_SCALE_MODE,    CUBLASLT_MATMUL_DESC_B_SCALE_MODE};
    for (size_t at = 0; at < sizeof names / sizeof *names; at++) {
        if (names[at] != attribute) continue;
        memcpy(places[at], value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    // What these say changes speed, or nothing here: alpha and beta are read alike wherever they lie.
    for (auto harmless : {CUBLASLT_MATMUL_DESC_FAST_ACCUM, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET,
                          CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_MATMUL_DESC_D_SCALE_MODE}) {
        if (harmless == attribute) return CUBLAS_STATUS_SUCCESS;
    }
    said.unknown = true;
    if (null_gpu_computes()) null_gpu_complain("cublasLtMatmul: nothing knows attribute %d", attribute);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
    *out = static_cast<cublasLtMatmulPreference_t>(null_gpu_handle());
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading) {
    *out = reinterpret_cast<cublasLtMatrixLayout_t>(
        new Layout{type, static_cast<long>(rows), static_cast<long>(columns), static_cast<long>(leading)});
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t opaque,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value, size_t) {
    auto& laid = *reinterpret_cast<Layout*>(opaque);
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) memcpy(&laid.batch, value, sizeof laid.batch);
    if (attribute == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) memcpy(&laid.stride, value, sizeof laid.stride);
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

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t first_layout, const void* b, cublasLtMatrixLayout_t second_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t added_layout, void* d,
                              cublasLtMatrixLayout_t out_layout, const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t) {
    const auto& said = *reinterpret_cast<const Description*>(description);
    const Layout &first = layout(first_layout), &second = layout(second_layout), &out = layout(out_layout);
    Multiplication asked;
    asked.m = out.rows, asked.n = out.columns;
    asked.k = said.first == CUBLAS_OP_N ? first.columns : first.rows;
    const long others = said.second == CUBLAS_OP_N ? second.rows : second.columns;
    if (asked.k != others) {
        null_gpu_complain("cublasLtMatmul: inner sizes %ld and %ld", asked.k, others);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    asked.first = factor(first, a, said.first, said.first_scale, said.first_scaling);
    asked.second = factor(second, b, said.second, said.second_scale, said.second_scaling);
    asked.alpha = *static_cast<const float*>(alpha), asked.beta = *static_cast<const float*>(beta);
    asked.tf32 = said.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    asked.added = c, asked.added_type = layout(added_layout).type, asked.added_leading = layout(added_layout).leading;
    asked.out = d, asked.out_type = out.type, asked.out_leading = out.leading;
    asked.out_scale = said.out_scale, asked.out_amax = said.out_amax;
    if (null_gpu_computes() && (said.unknown || !set_epilogue(said, out.type, &asked))) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return product("LtMatmul", asked, said.compute, out.batch,
                   {first.stride * sizes_of(first.type), second.stride * sizes_of(second.type),
                    out.stride * sizes_of(out.type)});
}

}  // extern "C"
