// Transformer Engine's norms: RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., 1607.06450).
//
// Each is called twice: without a workspace, to be told its size, and then to compute.

#include <transformer_engine/normalization.h>

#include "engine.h"

using engine::Matrix;
using engine::Tensor;

namespace {

bool asks_for_space(NVTETensor workspace) { return engine::count_of(Tensor{workspace}.rowwise()) == 0; }

std::vector<float> weights_of(NVTETensor gamma, bool zero_centered) {
    auto weights = engine::read(Tensor{gamma}.rowwise());
    for (float& weight : weights) weight += zero_centered ? 1.0f : 0.0f;
    return weights;
}

// What both norms do: y = (x - mean) * rsigma; `beta` and `mu` are null in RMSNorm, whose mean is none.
void forward(NVTETensor x, NVTETensor gamma, NVTETensor beta, float epsilon, NVTETensor z, NVTETensor mu,
             NVTETensor rsigma, bool zero_centered) {
    Matrix values = Tensor{x}.values();
    const auto weights = weights_of(gamma, zero_centered);
    const auto biases = beta ? engine::read(Tensor{beta}.rowwise()) : std::vector<float>();
    auto* means = mu ? Tensor{mu}.data<float>() : nullptr;
    auto* inverses = Tensor{rsigma}.data<float>();
    const auto width = static_cast<double>(values.columns);
    for (size_t at = 0; at < values.rows; at++) {
        float* row = values.row(at);
        double sum = 0, squares = 0;
        for (size_t i = 0; i < values.columns; i++) sum += row[i];
        const float mean = means ? static_cast<float>(sum / width) : 0.0f;
        for (size_t i = 0; i < values.columns; i++) squares += static_cast<double>(row[i] - mean) * (row[i] - mean);
        const auto inverse = static_cast<float>(1 / std::sqrt(squares / width + epsilon));
        for (size_t i = 0; i < values.columns; i++) {
            row[i] = weights[i] * (inverse * (row[i] - mean)) + (beta ? biases[i] : 0.0f);
        }
        if (means) means[at] = mean;
        inverses[at] = inverse;
    }
    engine::store({z}, values);
}

struct Gradients {
    Matrix inputs;
    std::vector<double> weights, biases;
};

// dx = rsigma * (g - mean(g) - y * mean(g * y)), g = dz * gamma; mean(g) only in LayerNorm.
Gradients backward(NVTETensor dz, NVTETensor x, NVTETensor mu, NVTETensor rsigma, NVTETensor gamma,
                   bool zero_centered) {
    const Matrix outputs = Tensor{dz}.values();
    Gradients found{Tensor{x}.values(), {}, {}};
    Matrix& values = found.inputs;
    const auto weights = weights_of(gamma, zero_centered);
    const auto* means = mu ? Tensor{mu}.data<float>() : nullptr;
    const auto* inverses = Tensor{rsigma}.data<float>();
    const auto width = static_cast<double>(values.columns);
    found.weights.resize(values.columns);
    found.biases.resize(values.columns);
    for (size_t at = 0; at < values.rows; at++) {
        float* row = values.row(at);
        const float* grad = outputs.row(at);
        double sum = 0, along = 0;
        for (size_t i = 0; i < values.columns; i++) {
            row[i] = inverses[at] * (row[i] - (means ? means[at] : 0.0f));
            sum += static_cast<double>(grad[i]) * weights[i];
            along += static_cast<double>(grad[i]) * weights[i] * row[i];
            found.weights[i] += static_cast<double>(grad[i]) * row[i];
            found.biases[i] += grad[i];
        }
        const auto centre = static_cast<float>(means ? sum / width : 0.0), slope = static_cast<float>(along / width);
        for (size_t i = 0; i < values.columns; i++) {
            row[i] = inverses[at] * (grad[i] * weights[i] - centre - row[i] * slope);
        }
    }
    return found;
}

void write_sums(NVTETensor to, const std::vector<double>& sums) {
    const std::vector<float> values(sums.begin(), sums.end());
    engine::write(Tensor{to}.rowwise(), 0, values.size(), values.data());
}

}  // namespace

extern "C" {

void nvte_rmsnorm_fwd(const NVTETensor x, const NVTETensor gamma, const float epsilon, NVTETensor z,
                      NVTETensor rsigma, NVTETensor workspace, const int processors, const bool zero_centered,
                      cudaStream_t stream) {
    const bool asks = asks_for_space(workspace);
    ENGINE_CHECKED(nvte_rmsnorm_fwd, x, gamma, epsilon, z, rsigma, workspace, processors, zero_centered, stream);
    if (!asks) forward(x, gamma, nullptr, epsilon, z, nullptr, rsigma, zero_centered);
}

void nvte_layernorm_fwd(const NVTETensor x, const NVTETensor gamma, const NVTETensor beta, const float epsilon,
                        NVTETensor z, NVTETensor mu, NVTETensor rsigma, NVTETensor workspace, const int processors,
                        const bool zero_centered, cudaStream_t stream) {
    const bool asks = asks_for_space(workspace);
    ENGINE_CHECKED(nvte_layernorm_fwd, x, gamma, beta, epsilon, z, mu, rsigma, workspace, processors, zero_centered,
                   stream);
    if (!asks) forward(x, gamma, beta, epsilon, z, mu, rsigma, zero_centered);
}

void nvte_rmsnorm_bwd(const NVTETensor dz, const NVTETensor x, const NVTETensor rsigma, const NVTETensor gamma,
                      NVTETensor dx, NVTETensor dgamma, NVTETensor workspace, const int processors,
                      const bool zero_centered, cudaStream_t stream) {
    const bool asks = asks_for_space(workspace);
    ENGINE_CHECKED(nvte_rmsnorm_bwd, dz, x, rsigma, gamma, dx, dgamma, workspace, processors, zero_centered, stream);
    if (asks) return;
    const auto found = backward(dz, x, nullptr, rsigma, gamma, zero_centered);
    engine::store({dx}, found.inputs);
    write_sums(dgamma, found.weights);
}

void nvte_rmsnorm_bwd_add(const NVTETensor dz, const NVTETensor x, const NVTETensor add, const NVTETensor rsigma,
                          const NVTETensor gamma, NVTETensor dx, NVTETensor dgamma, NVTETensor workspace,
                          const int processors, const bool zero_centered, cudaStream_t stream) {
    const bool asks = asks_for_space(workspace);
    ENGINE_CHECKED(nvte_rmsnorm_bwd_add, dz, x, add, rsigma, gamma, dx, dgamma, workspace, processors, zero_centered,
                   stream);
    if (asks) return;
    auto found = backward(dz, x, nullptr, rsigma, gamma, zero_centered);
    const Matrix added = Tensor{add}.values();
    for (size_t at = 0; at < added.values.size(); at++) found.inputs.values[at] += added.values[at];
    engine::store({dx}, found.inputs);
    write_sums(dgamma, found.weights);
}

void nvte_layernorm_bwd(const NVTETensor dz, const NVTETensor x, const NVTETensor mu, const NVTETensor rsigma,
                        const NVTETensor gamma, NVTETensor dx, NVTETensor dgamma, NVTETensor dbeta,
                        NVTETensor workspace, const int processors, const bool zero_centered, cudaStream_t stream) {
    const bool asks = asks_for_space(workspace);
    ENGINE_CHECKED(nvte_layernorm_bwd, dz, x, mu, rsigma, gamma, dx, dgamma, dbeta, workspace, processors,
                   zero_centered, stream);
    if (asks) return;
    const auto found = backward(dz, x, mu, rsigma, gamma, zero_centered);
    engine::store({dx}, found.inputs);
    write_sums(dgamma, found.weights);
    write_sums(dbeta, found.biases);
}

}  // extern "C"
