// A card's tensors as tensors of the host, for files that compute in the place of torch's CUDA kernels.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

namespace null_gpu {

// The same memory as a tensor of the CPU; tensors of the CPU as they are.
at::Tensor on_host(const at::Tensor& tensor);

// A copy on the card with the same strides; tensors of a card as they are.
at::Tensor on_card(const at::Tensor& tensor, at::Device device);

// Whether torch_fused.cpp computes it, because torch's CPU kernels cannot.
bool written_here(const std::string& name);

}  // namespace null_gpu
