// What libcudart.cpp keeps for the other null libraries, which are linked with it.
#pragma once

#include <cstddef>

extern "C" {
// A line for the log that ORTHANT_NULL_GPU_LOG names; nothing without it.
void null_gpu_note(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A line on stderr for what cannot be right: the call that said it fails as well.
void null_gpu_complain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Whether what kernels should compute is computed (ORTHANT_NULL_GPU_COMPUTE).
bool null_gpu_computes();

// While the sum of what this thread said is above 0, somebody else does the work of what it launches.
void null_gpu_replaced(int change);

// Whether this, launched now, would be computed by nobody. It is complained of, and has to fail.
bool null_gpu_hole(const char* what);

// Computes a kernel by its C++ name: 1 where that is done, -1 where it failed, 0 where nothing here stands for it.
int null_gpu_kernel(const char* name, unsigned blocks, void** arguments);

// A handle that nothing looks behind: memory of 256 bytes, kept until the process ends.
void* null_gpu_handle();

// The block that holds an address, of those that were allocated here.
bool null_gpu_block(const void* address, void** start, size_t* bytes);

// An attribute of the card by its number, which runtime and driver share; 0 for those that are not written down.
int null_gpu_attribute(int attribute);
}
