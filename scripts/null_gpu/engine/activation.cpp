// Transformer Engine's activations, alone and gated (Shazeer, arXiv 2002.05202), their derivatives, and the casts of
// gradients that add up what a bias gets on the way.

#include <transformer_engine/activation.h>
#include <transformer_engine/cast.h>

#include "engine.h"

using engine::Matrix;
using engine::Tensor;

namespace {

struct Activation {
    float (*value)(float);
    float (*slope)(float);
};

float logistic(float x) { return 1.0f / (1.0f + std::exp(-x)); }

const float kGeluInner = 0.79788456f, kGeluCube = 0.044715f;  // sqrt(2 / pi), of GELU's form with tanh
float gelu_tanh(float x) { return std::tanh(kGeluInner * x * (1 + kGeluCube * x * x)); }
float gelu(float x) { return 0.5f * x * (1 + gelu_tanh(x)); }
float gelu_slope(float x) {
    const float t = gelu_tanh(x);
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kGeluInner * (1 + 3 * kGeluCube * x * x);
}

float swish(float x, float sharpness) { return x * logistic(sharpness * x); }
float swish_slope(float x, float sharpness) {
    const float s = logistic(sharpness * x);
    return s + sharpness * x * s * (1 - s);
}

const Activation kGelu{gelu, gelu_slope};
const Activation kSilu{[](float x) { return swish(x, 1); }, [](float x) { return swish_slope(x, 1); }};
const Activation kQGelu{[](float x) { return swish(x, 1.702f); }, [](float x) { return swish_slope(x, 1.702f); }};
const Activation kRelu{[](float x) { return std::fmax(x, 0.0f); }, [](float x) { return x > 0 ? 1.0f : 0.0f; }};
const Activation kSRelu{[](float x) { return x > 0 ? x * x : 0.0f; }, [](float x) { return std::fmax(2 * x, 0.0f); }};

void activate(const Activation& act, NVTETensor input, NVTETensor output) {
    Matrix values = Tensor{input}.values();
    for (float& value : values.values) value = act.value(value);
    engine::store({output}, values);
}

Matrix derived(const Activation& act, NVTETensor grad, NVTETensor input) {
    Matrix grads = Tensor{grad}.values();
    const Matrix values = Tensor{input}.values();
    for (size_t at = 0; at < grads.values.size(); at++) grads.values[at] *= act.slope(values.values[at]);
    return grads;
}

// A row holds what is activated and, behind it, what that is multiplied with.
void gate(const Activation& act, NVTETensor input, NVTETensor output) {
    const Matrix values = Tensor{input}.values();
    const size_t width = values.columns / 2;
    Matrix gated(values.rows, width);
    for (size_t at = 0; at < values.rows; at++) {
        const float* row = values.row(at);
        for (size_t i = 0; i < width; i++) gated.row(at)[i] = act.value(row[i]) * row[width + i];
    }
    engine::store({output}, gated);
}

void ungate(const Activation& act, NVTETensor grad, NVTETensor input, NVTETensor output) {
    const Matrix grads = Tensor{grad}.values();
    Matrix values = Tensor{input}.values();
    const size_t width = values.columns / 2;
    for (size_t at = 0; at < values.rows; at++) {
        float* row = values.row(at);
        const float* from = grads.row(at);
        for (size_t i = 0; i < width; i++) {
            const float activated = row[i], gate = row[width + i];
            row[i] = from[i] * gate * act.slope(activated);
            row[width + i] = from[i] * act.value(activated);
        }
    }
    engine::store({output}, values);
}

// Asked for the workspace that they want, functions with a bias compute nothing.
bool asks_for_space(NVTETensor workspace) { return !Tensor{workspace}.rowwise().data_ptr; }

void store_with_sums(const Matrix& grads, NVTETensor output, NVTETensor dbias) {
    std::vector<double> sums(grads.columns);
    for (size_t at = 0; at < grads.rows; at++) {
        for (size_t i = 0; i < grads.columns; i++) sums[i] += grads.row(at)[i];
    }
    const std::vector<float> rounded(sums.begin(), sums.end());
    engine::write(Tensor{dbias}.rowwise(), 0, rounded.size(), rounded.data());
    engine::store({output}, grads);
}

}  // namespace

#define ACTIVATION(name, act)                                                                                       \
    void nvte_##name(const NVTETensor input, NVTETensor output, cudaStream_t stream) {                              \
        ENGINE_CHECKED(nvte_##name, input, output, stream);                                                         \
        activate(act, input, output);                                                                               \
    }                                                                                                               \
    void nvte_d##name(const NVTETensor grad, const NVTETensor input, NVTETensor output, cudaStream_t stream) {      \
        ENGINE_CHECKED(nvte_d##name, grad, input, output, stream);                                                  \
        engine::store({output}, derived(act, grad, input));                                                         \
    }                                                                                                               \
    void nvte_quantize_dbias_d##name(const NVTETensor grad, const NVTETensor input, NVTETensor output,              \
                                     NVTETensor dbias, NVTETensor workspace, cudaStream_t stream) {                 \
        const bool asks = asks_for_space(workspace);                                                                \
        ENGINE_CHECKED(nvte_quantize_dbias_d##name, grad, input, output, dbias, workspace, stream);                 \
        if (!asks) store_with_sums(derived(act, grad, input), output, dbias);                                       \
    }

#define GATED(name, act)                                                                                            \
    void nvte_##name(const NVTETensor input, NVTETensor output, cudaStream_t stream) {                              \
        ENGINE_CHECKED(nvte_##name, input, output, stream);                                                         \
        gate(act, input, output);                                                                                   \
    }                                                                                                               \
    void nvte_d##name(const NVTETensor grad, const NVTETensor input, NVTETensor output, cudaStream_t stream) {      \
        ENGINE_CHECKED(nvte_d##name, grad, input, output, stream);                                                  \
        ungate(act, grad, input, output);                                                                           \
    }

extern "C" {

ACTIVATION(gelu, kGelu)
ACTIVATION(silu, kSilu)
ACTIVATION(relu, kRelu)
ACTIVATION(qgelu, kQGelu)
ACTIVATION(srelu, kSRelu)
GATED(geglu, kGelu)
GATED(swiglu, kSilu)
GATED(reglu, kRelu)
GATED(qgeglu, kQGelu)
GATED(sreglu, kSRelu)

void nvte_quantize_dbias(const NVTETensor input, NVTETensor output, NVTETensor dbias, NVTETensor workspace,
                         cudaStream_t stream) {
    const bool asks = asks_for_space(workspace);
    ENGINE_CHECKED(nvte_quantize_dbias, input, output, dbias, workspace, stream);
    if (!asks) store_with_sums(Tensor{input}.values(), output, dbias);
}

}  // extern "C"
