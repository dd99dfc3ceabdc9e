// Delayed scaling: what was largest in the steps before, and the scales from it.

#include <transformer_engine/recipe.h>

#include <algorithm>

#include "engine.h"

using engine::Tensor;

namespace {

// Histories [length, count]: the newest entry stands first and is moved to the end, the oldest falls out, and a zero
// takes the first place. `newest` is the one to take, where it is told from outside.
float rolled(float* history, size_t length, size_t stride, float newest, bool most_recent) {
    float largest = newest;
    for (size_t at = 0; at + 1 < length; at++) {
        history[at * stride] = history[(at + 1) * stride];
        largest = std::fmax(largest, history[at * stride]);
    }
    history[(length - 1) * stride] = newest;
    history[0] = 0;
    return most_recent ? newest : largest;
}

float rescaled(float amax, float before, float largest) {
    if (!std::isfinite(amax) || amax <= 0) return before;
    const float scale = largest / amax;
    return std::isinf(scale) ? engine::largest_of(kNVTEFloat32) : scale;
}

}  // namespace

extern "C" {

void nvte_delayed_scaling_recipe_amax_and_scale_update(const NVTETensor amax_history, const NVTETensor scale,
                                                       NVTETensor updated_history, NVTETensor updated_scale,
                                                       const char* algorithm, NVTEDType type, float margin,
                                                       cudaStream_t stream) {
    ENGINE_CHECKED(nvte_delayed_scaling_recipe_amax_and_scale_update, amax_history, scale, updated_history,
                   updated_scale, algorithm, type, margin, stream);
    const NVTEShape shape = Tensor{amax_history}.shape();
    const size_t length = shape.data[0], count = shape.data[1];
    auto history = engine::read(Tensor{amax_history}.rowwise());
    const auto before = engine::read(Tensor{scale}.rowwise());
    const float largest = engine::largest_of(type) * std::exp2(-margin);
    for (size_t at = 0; at < count; at++) {
        const bool most_recent = std::string(algorithm) == "most_recent";
        const float amax = rolled(history.data() + at, length, count, history[at], most_recent);
        Tensor{updated_scale}.data<float>()[at] = rescaled(amax, before[at], largest);
    }
    std::copy(history.begin(), history.end(), Tensor{updated_history}.data<float>());
}

void nvte_delayed_scaling_recipe_amax_and_scale_update_after_reduction(
    const NVTETensor buffer, std::vector<NVTETensor> histories, std::vector<NVTETensor> scales, const char* algorithm,
    NVTEDType type, float margin, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_delayed_scaling_recipe_amax_and_scale_update_after_reduction, buffer, histories, scales,
                   algorithm, type, margin, stream);
    const bool most_recent = std::string(algorithm) == "most_recent";
    const float largest = engine::largest_of(type) * std::exp2(-margin);
    const float* reduced = Tensor{buffer}.data<float>();
    for (size_t tensor = 0; tensor < histories.size(); tensor++) {
        const NVTEShape shape = Tensor{histories[tensor]}.shape();
        const size_t length = shape.data[0], count = shape.data[1];
        auto* history = Tensor{histories[tensor]}.data<float>();
        auto* scale = Tensor{scales[tensor]}.data<float>();
        for (size_t at = 0; at < count; at++, reduced += reduced ? 1 : 0) {
            const float newest = reduced && *reduced != 0 ? *reduced : history[at];
            float amax = newest;
            if (newest != 0) amax = rolled(history + at, length, count, newest, most_recent);
            scale[at] = rescaled(amax, scale[at], largest);
        }
    }
}

}  // extern "C"
