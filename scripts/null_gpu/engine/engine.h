// Transformer Engine's functions, computed on the host: what the files of this folder share.
//
// A function written here takes the place of libtransformer_engine's of the same name. Tensors and configurations stay
// the real library's, and it is called first (`checked`), with its kernels left out: what it checks and fills in on the
// host is real. Then the numbers are computed here, in float32 and float64, from the published definitions.
#pragma once

#include <transformer_engine/transformer_engine.h>

#include <cstddef>
#include <string>
#include <vector>

#include "numbers.h"

namespace engine {

// What cannot be computed: an exception, which Python sees as RuntimeError.
[[noreturn]] void refuse(const std::string& why);

// The real library's function of this name.
void* real_function(const char* name);

// While one of these lives, kernels that this thread launches are left out without a word: their work is done here.
class Replaced {
   public:
    Replaced();
    ~Replaced();
    Replaced(const Replaced&) = delete;
    Replaced& operator=(const Replaced&) = delete;
};

// Calls the real function for what it checks and does on the host.
template <typename Function, typename... Arguments>
void checked(Function* ours, const char* name, Arguments... arguments) {
    (void)ours;
    Replaced replaced;
    reinterpret_cast<Function*>(real_function(name))(arguments...);
}
#define ENGINE_CHECKED(function, ...) ::engine::checked(function, #function, __VA_ARGS__)

size_t element_bytes(NVTEDType type);
bool is_fp8(NVTEDType type);
const Fp8& fp8_format(NVTEDType type);

// `count` values from place `start` on, as float.
void read(const NVTEBasicTensor& from, size_t start, size_t count, float* out);
std::vector<float> read(const NVTEBasicTensor& from);

// Values rounded to the tensor's type, unscaled.
void write(const NVTEBasicTensor& to, size_t start, size_t count, const float* values);

size_t count_of(const NVTEBasicTensor& tensor);

// Values in rows, one behind the other.
struct Matrix {
    size_t rows, columns;
    std::vector<float> values;

    Matrix(size_t rows, size_t columns) : rows(rows), columns(columns), values(rows * columns) {}
    float* row(size_t at) { return values.data() + at * columns; }
    const float* row(size_t at) const { return values.data() + at * columns; }
    Matrix transposed() const;
};

// One of the real library's tensors.
struct Tensor {
    NVTETensor handle;

    NVTEBasicTensor part(NVTETensorParam which) const { return nvte_get_tensor_param(handle, which); }
    NVTEBasicTensor rowwise() const { return part(kNVTERowwiseData); }
    NVTEBasicTensor columnwise() const { return part(kNVTEColumnwiseData); }
    float* scale() const { return static_cast<float*>(part(kNVTEScale).data_ptr); }
    float* amax() const { return static_cast<float*>(part(kNVTEAmax).data_ptr); }
    NVTEScalingMode mode() const { return nvte_tensor_scaling_mode(handle); }
    NVTEShape shape() const { return nvte_tensor_shape(handle); }
    NVTEDType type() const { return nvte_tensor_type(handle); }
    bool there() const { return handle && rowwise().data_ptr; }

    // As a matrix: the last dimension, and all before it.
    size_t columns() const;
    size_t rows() const;

    // All values, unscaled where they were scaled.
    Matrix values() const;

    // The first number, of tensors that hold one.
    template <typename Number>
    Number* data() const {
        return static_cast<Number*>(rowwise().data_ptr);
    }
};

// How values are quantized, from NVTEQuantizationConfig.
struct Quantization {
    bool powers_of_two = false;
    float epsilon = 0;
    bool compact = false;           // scales of blocks as they are sent, not as products take them
    const float* noop = nullptr;    // 1: nothing is to be done
    float largest_input = 3.4028234663852886e38f;  // of the type that the values came in

    Quantization() = default;
    explicit Quantization(NVTEQuantizationConfig config);
    bool skipped() const { return noop && *noop == 1.0f; }
};

float largest_of(NVTEDType type);

// scale = largest of FP8 / amax, with what the recipes make of zero, infinity and powers of two.
float scale_from_amax(float amax, float largest, bool powers_of_two, float epsilon, float instead_of_infinity);

// Matrix values into whatever the tensor is: rounded, or quantized by its scaling mode, rowwise and columnwise; its
// amax grows by them.
void store(const Tensor& out, const Matrix& values, const Quantization& how = {});

}  // namespace engine
