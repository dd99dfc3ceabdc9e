// Transformer Engine's casts: into FP8 and back, transposes, the largest values and the scales from them.

#include <transformer_engine/cast.h>
#include <transformer_engine/recipe.h>
#include <transformer_engine/transpose.h>

#include <algorithm>

#include "engine.h"

using engine::Matrix;
using engine::Quantization;
using engine::Tensor;

namespace {

void quantize(NVTETensor input, NVTETensor output, Quantization how) {
    const Tensor in{input};
    how.largest_input = engine::largest_of(in.type());
    engine::store({output}, in.values(), how);
}

// Bytes of [rows, columns] elements to [columns, rows].
void turn(const void* from, void* to, size_t rows, size_t columns, size_t bytes) {
    for (size_t row = 0; row < rows; row++) {
        for (size_t column = 0; column < columns; column++) {
            memcpy(static_cast<char*>(to) + (column * rows + row) * bytes,
                   static_cast<const char*>(from) + (row * columns + column) * bytes, bytes);
        }
    }
}

void amax_of(NVTETensor input, NVTETensor output, const Quantization& how) {
    if (how.skipped()) return;
    const Tensor out{output};
    float* amax = out.amax() ? out.amax() : static_cast<float*>(out.part(kNVTEColumnwiseAmax).data_ptr);
    *amax = 0;
    for (float value : engine::read(Tensor{input}.rowwise())) *amax = std::fmax(*amax, std::fabs(value));
}

}  // namespace

extern "C" {

void nvte_quantize(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_quantize, input, output, stream);
    quantize(input, output, {});
}

void nvte_quantize_noop(const NVTETensor input, NVTETensor output, NVTETensor noop, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_quantize_noop, input, output, noop, stream);
    Quantization how;
    how.noop = Tensor{noop}.data<float>();
    quantize(input, output, how);
}

void nvte_quantize_v2(const NVTETensor input, NVTETensor output, const NVTEQuantizationConfig config,
                      cudaStream_t stream) {
    ENGINE_CHECKED(nvte_quantize_v2, input, output, config, stream);
    quantize(input, output, Quantization(config));
}

void nvte_cast_transpose(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cast_transpose, input, output, stream);
    quantize(input, output, {});
}

void nvte_multi_cast_transpose(size_t count, const NVTETensor* inputs, NVTETensor* outputs, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_multi_cast_transpose, count, inputs, outputs, stream);
    for (size_t at = 0; at < count; at++) quantize(inputs[at], outputs[at], {});
}

void nvte_dequantize(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_dequantize, input, output, stream);
    engine::store({output}, Tensor{input}.values());
}

void nvte_transpose(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_transpose, input, output, stream);
    const Tensor in{input};
    turn(in.rowwise().data_ptr, Tensor{output}.rowwise().data_ptr, in.rows(), in.columns(),
         engine::element_bytes(in.type()));
}

void nvte_swap_first_dims(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_swap_first_dims, input, output, stream);
    const Tensor in{input};
    const NVTEShape shape = in.shape();
    size_t bytes = engine::element_bytes(in.type());
    for (size_t at = 2; at < shape.ndim; at++) bytes *= shape.data[at];
    turn(in.rowwise().data_ptr, Tensor{output}.rowwise().data_ptr, shape.data[0], shape.data[1], bytes);
}

void nvte_compute_amax(const NVTETensor input, NVTETensor output, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_compute_amax, input, output, stream);
    amax_of(input, output, {});
}

void nvte_compute_amax_with_config(const NVTETensor input, NVTETensor output, const NVTEQuantizationConfig config,
                                   cudaStream_t stream) {
    ENGINE_CHECKED(nvte_compute_amax_with_config, input, output, config, stream);
    amax_of(input, output, Quantization(config));
}

void nvte_compute_scale_from_amax(NVTETensor output, const NVTEQuantizationConfig config, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_compute_scale_from_amax, output, config, stream);
    const Quantization how(config);
    const Tensor out{output};
    if (how.skipped()) return;
    *out.scale() = engine::scale_from_amax(*out.amax(), engine::largest_of(out.type()), how.powers_of_two, how.epsilon,
                                           engine::largest_of(kNVTEFloat32));
}

void nvte_memset(void* start, int value, size_t bytes, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_memset, start, value, bytes, stream);
    memset(start, value, bytes);
}

}  // extern "C"
