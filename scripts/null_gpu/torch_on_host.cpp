// Operators of torch's that have a CUDA kernel, computed by torch's CPU kernels on the same memory: a card's memory is the
// host's here. Loaded into a process that computes (ORTHANT_NULL_GPU_COMPUTE); what is not computed by this file or by
// the libraries beside it launches a kernel, which fails by its name.
//
// Random operators draw from a CPU generator whose seed is made of the CUDA generator's seed and offset, and move the
// offset on, so that states of the CUDA generator mean what they mean on a card.

#include "torch_on_host.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>

#include <set>
#include <string>
#include <vector>

namespace null_gpu {

at::Tensor on_host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    TORCH_CHECK(tensor.layout() == at::kStrided, "null GPU: nothing computes with a tensor of layout ", tensor.layout());
    TORCH_CHECK(!tensor.is_conj() && !tensor.is_neg(), "null GPU: nothing computes with conjugated views");
    return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

at::Tensor on_card(const at::Tensor& tensor, at::Device device) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    auto moved = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
    on_host(moved).copy_(tensor);
    return moved;
}

}  // namespace null_gpu

namespace {

using null_gpu::on_card;
using null_gpu::on_host;

// What the host does itself, or what only a card can answer.
const std::set<std::string> kLeft = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::set_", "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor", "aten::record_stream", "aten::is_set_to",
    "aten::_local_scalar_dense", "aten::_fused_sdp_choice", "aten::_efficientzerotensor", "aten::_pin_memory",
    "aten::is_pinned", "aten::copy_",
};

std::string full_name(const c10::FunctionSchema& schema) {
    return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

bool gives_a_view(const c10::FunctionSchema& schema) {
    for (const auto& value : schema.returns()) {
        if (value.alias_info() && !value.alias_info()->isWrite()) return true;
    }
    return false;
}

// A tensor that an operator writes into, as the operator sees it and as its caller does.
struct Written {
    at::Tensor card, host;
};

struct Call {
    c10::Device device = c10::Device(at::kCUDA, 0);
    std::vector<Written> written;

    at::Tensor moved(const at::Tensor& tensor, bool is_written) {
        if (!tensor.defined() || !tensor.is_cuda()) return tensor;
        // A result that is still to be given its size cannot be an alias, whose memory is somebody else's.
        bool unsized = is_written && tensor.numel() == 0;
        auto host = unsized ? at::empty(tensor.sizes(), tensor.options().device(at::kCPU)) : on_host(tensor);
        if (is_written) written.push_back({tensor, host});
        return host;
    }

    void settle() {
        for (auto& one : written) {
            if (one.card.sizes() == one.host.sizes()) continue;
            one.card.resize_(one.host.sizes());
            on_host(one.card).copy_(one.host);
        }
    }

    at::Tensor back(const at::Tensor& tensor) {
        for (auto& one : written) {
            if (one.host.is_same(tensor)) return one.card;
        }
        return on_card(tensor, device);
    }
};

class Draws {
  public:
    Draws(bool random, const std::optional<at::Generator>& asked) : random_(random) {
        if (!random_) return;
        auto cuda = asked && asked->defined() && asked->device().is_cuda() ? *asked
                                                                          : at::cuda::detail::getDefaultCUDAGenerator();
        std::lock_guard<std::mutex> hold(cuda.mutex());
        auto* state = cuda.get<at::CUDAGeneratorImpl>();
        uint64_t offset = state->philox_offset_per_thread();
        state->set_philox_offset_per_thread(offset + 4);
        seed_ = (state->current_seed() + 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull ^ (offset + 1) * 0x94D049BB133111EBull;
        common_ = at::detail::getDefaultCPUGenerator();
        kept_ = common_.get_state();
        common_.set_current_seed(seed_);
    }
    ~Draws() {
        if (random_) common_.set_state(kept_);
    }
    at::Generator generator() const { return at::detail::createCPUGenerator(seed_); }

  private:
    bool random_;
    uint64_t seed_ = 0;
    at::Generator common_;
    at::Tensor kept_;
};

c10::Device device_of(const torch::jit::Stack& stack, size_t first) {
    for (size_t at = first; at < stack.size(); at++) {
        if (stack[at].isTensor() && stack[at].toTensor().defined() && stack[at].toTensor().is_cuda()) {
            return stack[at].toTensor().device();
        }
        if (stack[at].isTensorList()) {
            for (const at::Tensor& one : stack[at].toTensorList()) {
                if (one.is_cuda()) return one.device();
            }
        }
    }
    return c10::Device(at::kCUDA, c10::cuda::current_device());
}

std::optional<at::Generator> asked_generator(const torch::jit::Stack& stack, size_t first) {
    for (size_t at = first; at < stack.size(); at++) {
        if (stack[at].isGenerator()) return stack[at].toGenerator();
    }
    return std::nullopt;
}

c10::IValue argument(const c10::IValue& value, bool is_written, Call& call, const Draws& draws) {
    if (value.isTensor()) return call.moved(value.toTensor(), is_written);
    if (value.isTensorList()) {
        c10::List<at::Tensor> moved;
        for (const at::Tensor& one : value.toTensorList()) moved.push_back(call.moved(one, is_written));
        return moved;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> moved;
        for (const std::optional<at::Tensor>& one : value.toOptionalTensorList()) {
            moved.push_back(one ? std::make_optional(call.moved(*one, is_written)) : one);
        }
        return moved;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(at::kCPU);
    if (value.isGenerator() && value.toGenerator().device().is_cuda()) return draws.generator();
    return value;
}

c10::IValue result(const c10::IValue& value, Call& call) {
    if (value.isTensor()) return call.back(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> moved;
        for (const at::Tensor& one : value.toTensorList()) moved.push_back(call.back(one));
        return moved;
    }
    return value;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const size_t count = schema.arguments().size(), first = stack->size() - count;
    Call call;
    call.device = device_of(*stack, first);
    const bool random = op.hasTag(at::Tag::nondeterministic_seeded) || asked_generator(*stack, first);
    Draws draws(random, asked_generator(*stack, first));
    for (size_t at = 0; at < count; at++) {
        const auto* alias = schema.arguments()[at].alias_info();
        (*stack)[first + at] = argument((*stack)[first + at], alias && alias->isWrite(), call, draws);
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    call.settle();
    for (size_t at = stack->size() - schema.returns().size(); at < stack->size(); at++) {
        (*stack)[at] = result((*stack)[at], call);
    }
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool) {
    on_host(self).copy_(on_host(source));
    return self;
}

std::vector<std::string> computed_by_cpu_kernels() {
    std::vector<std::string> found;
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
        if (name.getNamespace() != std::string_view("aten")) continue;
        auto op = dispatcher.findSchema(name);
        if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
        auto full = full_name(op->schema());
        if (kLeft.count(full) || gives_a_view(op->schema()) || null_gpu::written_here(full)) continue;
        bool has_one = op->hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
                       op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
                       op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
        if (has_one) found.push_back(full);
    }
    return found;
}

struct Silence : c10::WarningHandler {
    void process(const c10::Warning&) override {}
};

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    Silence silence;  // that a kernel is replaced by another one is what this file is for
    c10::WarningUtils::WarningHandlerGuard guard(&silence);
    for (const auto& name : computed_by_cpu_kernels()) {
        library.impl(name.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
    }
    library.impl("copy_", TORCH_FN(copy));
}
