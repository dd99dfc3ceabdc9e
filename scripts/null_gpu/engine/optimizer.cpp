// Transformer Engine's functions over lists of tensors: Adam (Kingma and Ba, arXiv 1412.6980; AdamW: 1711.05101), norms,
// scaling.

#include <transformer_engine/multi_tensor.h>

#include "engine.h"

using engine::Tensor;

namespace {

enum List { kGradient, kParameter, kFirst, kSecond, kMaster };

// One step of Adam for all tensors.
struct Adam {
    float rate, beta1, beta2, epsilon;
    double correction1 = 1, correction2 = 1;  // 1 - beta^step
    bool decoupled;                           // decay as AdamW's
    float decay;
    float inverse_scale = 1;                  // of the gradients

    Adam(float rate, float beta1, float beta2, float epsilon, int step, int mode, int bias_correction, float decay)
        : rate(rate), beta1(beta1), beta2(beta2), epsilon(epsilon), decoupled(mode == 1), decay(decay) {
        if (bias_correction == 1) {
            correction1 = static_cast<float>(1 - std::pow(static_cast<double>(beta1), step));
            correction2 = static_cast<float>(1 - std::pow(static_cast<double>(beta2), step));
        }
    }

    float stepped(float parameter, float gradient, float& first, float& second) const {
        if (!decoupled) gradient += decay * parameter;
        first = beta1 * first + (1 - beta1) * gradient;
        second = beta2 * second + (1 - beta2) * gradient * gradient;
        const float unbiased = first / static_cast<float>(correction1);
        float update = unbiased / (std::sqrt(second / static_cast<float>(correction2)) + epsilon);
        if (decoupled) update += decay * parameter;
        return parameter - rate * update;
    }
};

// Parameters of the list `from`, stepped, into `into`; gradients are put back where they were scaled.
void step_all(const Adam& adam, NVTETensor** lists, size_t count, List from, const std::vector<List>& into,
              bool scaled) {
    for (size_t at = 0; at < count; at++) {
        const auto part = [&](List list) { return Tensor{lists[list][at]}.rowwise(); };
        auto gradients = engine::read(part(kGradient)), parameters = engine::read(part(from));
        auto firsts = engine::read(part(kFirst)), seconds = engine::read(part(kSecond));
        for (size_t i = 0; i < parameters.size(); i++) {
            gradients[i] *= adam.inverse_scale;
            parameters[i] = adam.stepped(parameters[i], gradients[i], firsts[i], seconds[i]);
        }
        if (scaled) engine::write(part(kGradient), 0, gradients.size(), gradients.data());
        engine::write(part(kFirst), 0, firsts.size(), firsts.data());
        engine::write(part(kSecond), 0, seconds.size(), seconds.data());
        for (List list : into) engine::write(part(list), 0, parameters.size(), parameters.data());
    }
}

// A float32 as bfloat16, rounded, and 16 bits behind it, whose sign tells that the rounding was upwards.
float joined(uint16_t rounded, int16_t rest) {
    const auto high = static_cast<uint16_t>(rest < 0 ? rounded - 1 : rounded);
    return engine::float_of(static_cast<uint32_t>(high) << 16 | static_cast<uint16_t>(rest));
}

void step_with_remainders(const Adam& adam, NVTETensor** lists, size_t count) {
    for (size_t at = 0; at < count; at++) {
        const auto part = [&](List list) { return Tensor{lists[list][at]}.rowwise(); };
        const auto gradients = engine::read(part(kGradient));
        auto* parameters = static_cast<uint16_t*>(part(kParameter).data_ptr);
        auto* rests = static_cast<int16_t*>(part(kMaster).data_ptr);
        auto* firsts = static_cast<float*>(part(kFirst).data_ptr);
        auto* seconds = static_cast<float*>(part(kSecond).data_ptr);
        for (size_t i = 0; i < gradients.size(); i++) {
            const float whole = joined(parameters[i], rests[i]);
            const uint32_t bits = engine::bits_of(adam.stepped(whole, gradients[i], firsts[i], seconds[i]));
            rests[i] = static_cast<int16_t>(bits & 0xffff);
            parameters[i] = static_cast<uint16_t>((bits >> 16) + (rests[i] < 0 ? 1 : 0));
        }
    }
}

// The L2 norms of the first list, times `scale`; says in `flag` when one is no number.
void norms(NVTETensor flag, NVTETensor** lists, size_t count, NVTETensor all, NVTETensor each, bool per_tensor,
           double scale) {
    double whole = 0;
    for (size_t at = 0; at < count; at++) {
        double squares = 0;
        for (float value : engine::read(Tensor{lists[0][at]}.rowwise())) {
            squares += scale * value * scale * value;
        }
        whole += squares;
        if (per_tensor) Tensor{each}.data<float>()[at] = static_cast<float>(std::sqrt(squares));
        if (!std::isfinite(static_cast<float>(squares))) *Tensor{flag}.data<int>() = 1;
    }
    *Tensor{all}.data<float>() = static_cast<float>(std::sqrt(whole));
}

}  // namespace

extern "C" {

void nvte_multi_tensor_adam_cuda(int chunk, NVTETensor flag, NVTETensor** lists, const size_t of_lists,
                                 const size_t count, const float lr, const float beta1, const float beta2,
                                 const float epsilon, const int step, const int mode, const int bias_correction,
                                 const float decay, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_adam_cuda, chunk, flag, lists, of_lists, count, lr, beta1, beta2, epsilon, step,
                   mode, bias_correction, decay, stream);
    const Adam adam(lr, beta1, beta2, epsilon, step, mode, bias_correction, decay);
    if (of_lists == 5) {
        step_all(adam, lists, count, kMaster, {kMaster, kParameter}, false);
    } else {
        step_all(adam, lists, count, kParameter, {kParameter}, false);
    }
}

void nvte_multi_tensor_adam_param_remainder_cuda(int chunk, NVTETensor flag, NVTETensor** lists,
                                                 const size_t of_lists, const size_t count, const float lr,
                                                 const float beta1, const float beta2, const float epsilon,
                                                 const int step, const int mode, const int bias_correction,
                                                 const float decay, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_adam_param_remainder_cuda, chunk, flag, lists, of_lists, count, lr, beta1, beta2,
                   epsilon, step, mode, bias_correction, decay, stream);
    step_with_remainders(Adam(lr, beta1, beta2, epsilon, step, mode, bias_correction, decay), lists, count);
}

void nvte_multi_tensor_adam_capturable_cuda(int chunk, NVTETensor flag, NVTETensor** lists, const size_t of_lists,
                                            const size_t count, NVTETensor lr, const float beta1, const float beta2,
                                            const float epsilon, NVTETensor step, const int mode,
                                            const int bias_correction, const float decay, NVTETensor inverse_scale,
                                            cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_adam_capturable_cuda, chunk, flag, lists, of_lists, count, lr, beta1, beta2,
                   epsilon, step, mode, bias_correction, decay, inverse_scale, stream);
    if (*Tensor{flag}.data<int>() == 1) return;
    Adam adam(*Tensor{lr}.data<float>(), beta1, beta2, epsilon, *Tensor{step}.data<int>(), mode, bias_correction,
              decay);
    adam.inverse_scale = *Tensor{inverse_scale}.data<float>();
    step_all(adam, lists, count, kParameter, {kParameter}, true);
}

void nvte_multi_tensor_adam_capturable_master_cuda(int chunk, NVTETensor flag, NVTETensor** lists,
                                                   const size_t of_lists, const size_t count, NVTETensor lr,
                                                   const float beta1, const float beta2, const float epsilon,
                                                   NVTETensor step, const int mode, const int bias_correction,
                                                   const float decay, NVTETensor inverse_scale, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_adam_capturable_master_cuda, chunk, flag, lists, of_lists, count, lr, beta1,
                   beta2, epsilon, step, mode, bias_correction, decay, inverse_scale, stream);
    if (*Tensor{flag}.data<int>() == 1) return;
    Adam adam(*Tensor{lr}.data<float>(), beta1, beta2, epsilon, *Tensor{step}.data<int>(), mode, bias_correction,
              decay);
    adam.inverse_scale = *Tensor{inverse_scale}.data<float>();
    step_all(adam, lists, count, kMaster, {kMaster, kParameter}, true);
}

void nvte_multi_tensor_l2norm_cuda(int chunk, NVTETensor flag, NVTETensor** lists, const size_t of_lists,
                                   const size_t count, NVTETensor output, NVTETensor output_per_tensor, NVTETensor ret,
                                   NVTETensor ret_per_tensor, int per_tensor, int most_chunks, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_l2norm_cuda, chunk, flag, lists, of_lists, count, output, output_per_tensor, ret,
                   ret_per_tensor, per_tensor, most_chunks, stream);
    norms(flag, lists, count, ret, ret_per_tensor, per_tensor, 1);
}

void nvte_multi_tensor_unscale_l2norm_cuda(int chunk, NVTETensor flag, NVTETensor** lists, const size_t of_lists,
                                           const size_t count, NVTETensor output, NVTETensor output_per_tensor,
                                           NVTETensor ret, NVTETensor ret_per_tensor, NVTETensor inverse_scale,
                                           int per_tensor, int most_chunks, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_unscale_l2norm_cuda, chunk, flag, lists, of_lists, count, output,
                   output_per_tensor, ret, ret_per_tensor, inverse_scale, per_tensor, most_chunks, stream);
    norms(flag, lists, count, ret, ret_per_tensor, per_tensor, *Tensor{inverse_scale}.data<float>());
}

void nvte_multi_tensor_scale_cuda(int chunk, NVTETensor flag, NVTETensor** lists, const size_t of_lists,
                                  const size_t count, float scale, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_scale_cuda, chunk, flag, lists, of_lists, count, scale, stream);
    for (size_t at = 0; at < count; at++) {
        auto values = engine::read(Tensor{lists[0][at]}.rowwise());
        for (float& value : values) {
            if (!std::isfinite(value)) *Tensor{flag}.data<int>() = 1;
            value *= scale;
        }
        engine::write(Tensor{lists[1][at]}.rowwise(), 0, values.size(), values.data());
    }
}

void nvte_multi_tensor_compute_scale_and_scale_inv_cuda(int chunk, NVTETensor flag, NVTETensor** lists,
                                                        const size_t of_lists, const size_t count, float largest,
                                                        int powers_of_two, float epsilon, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_tensor_compute_scale_and_scale_inv_cuda, chunk, flag, lists, of_lists, count, largest,
                   powers_of_two, epsilon, stream);
    for (size_t at = 0; at < count; at++) {
        const auto amaxes = engine::read(Tensor{lists[0][at]}.rowwise());
        for (size_t i = 0; i < amaxes.size(); i++) {
            const float scale = engine::scale_from_amax(amaxes[i], largest, powers_of_two, epsilon,
                                                        engine::largest_of(kNVTEFloat32));
            Tensor{lists[1][at]}.data<float>()[i] = scale;
            Tensor{lists[2][at]}.data<float>()[i] = 1.0f / scale;
        }
    }
}

}  // extern "C"
