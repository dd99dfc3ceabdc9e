// What a product of cuBLAS's says, for libcublas_products.cpp, which computes it.
#pragma once

#include <library_types.h>

#include <cstddef>

// A matrix as BLAS sees it: columns one behind the other, `leading` apart.
struct Factor {
    const void* data = nullptr;
    cudaDataType type = CUDA_R_32F;
    bool transposed = false;
    long leading = 0;
    const void* scale = nullptr;
    enum Scaling { kWhole, kVectors, kBlocks } scaling = kWhole;  // what one scale is for: all, 1 x 128, 128 x 128
};

// D = epilogue(alpha * op(A) * op(B) + beta * C), [m, n], sums over k.
struct Multiplication {
    long m = 0, n = 0, k = 0;
    Factor first, second;
    float alpha = 1, beta = 0;
    bool tf32 = false;
    const void* added = nullptr;
    cudaDataType added_type = CUDA_R_32F;
    long added_leading = 0;
    void* out = nullptr;
    cudaDataType out_type = CUDA_R_32F;
    long out_leading = 0;
    const void* out_scale = nullptr;
    void* out_amax = nullptr;
    enum Bias { kNone, kAdded, kSumOfOut, kSumOfFirst, kSumOfSecond } bias = kNone;
    void* bias_data = nullptr;
    cudaDataType bias_type = CUDA_R_32F;
    enum Activation { kIdentity, kRelu, kGelu, kGeluBackward } activation = kIdentity;
    void* aux = nullptr;  // what was put into the activation: written forward, if it is there, and read backward
    cudaDataType aux_type = CUDA_R_32F;
    long aux_leading = 0;
};

// Computes it; false, after a complaint, where it asks for what is not known here.
bool null_gpu_multiply(const Multiplication& asked);
