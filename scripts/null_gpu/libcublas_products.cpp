// In the place of libcublas and libcublasLt, second half: products that are computed, where that is asked for.
//
// Factors become float32 (of TF32's precision where cuBLAS may take that), FP8's by their scales; sums are float32's.

#include "products.h"

#include <algorithm>
#include <vector>

#include "engine/numbers.h"
#include "null_gpu.h"

namespace {

const long kWide = 32, kHigh = 8;  // of the output that is summed up at once
typedef float Lane __attribute__((vector_size(64), aligned(4)));
const long kLane = 16, kLanes = kWide / kLane;

size_t bytes_of(cudaDataType type) {
    switch (type) {
        case CUDA_R_32F: return 4;
        case CUDA_R_16F:
        case CUDA_R_16BF: return 2;
        case CUDA_R_8F_E4M3:
        case CUDA_R_8F_E5M2: return 1;
        default: return 0;
    }
}

bool is_fp8(cudaDataType type) { return bytes_of(type) == 1; }

void read(const void* data, cudaDataType type, long start, long count, float* out) {
    const char* first = static_cast<const char*>(data) + start * static_cast<long>(bytes_of(type));
    const auto* words = reinterpret_cast<const uint16_t*>(first);
    const auto* codes = reinterpret_cast<const uint8_t*>(first);
    if (type == CUDA_R_32F) {
        memcpy(out, first, count * sizeof(float));
    } else if (type == CUDA_R_16BF) {
        for (long at = 0; at < count; at++) out[at] = engine::from_bfloat16(words[at]);
    } else if (type == CUDA_R_16F) {
        for (long at = 0; at < count; at++) out[at] = engine::from_float16(words[at]);
    } else {
        const float* values = engine::fp8_values(type == CUDA_R_8F_E4M3);
        for (long at = 0; at < count; at++) out[at] = values[codes[at]];
    }
}

void write(void* data, cudaDataType type, long start, long count, const float* values) {
    char* first = static_cast<char*>(data) + start * static_cast<long>(bytes_of(type));
    auto* words = reinterpret_cast<uint16_t*>(first);
    auto* codes = reinterpret_cast<uint8_t*>(first);
    const engine::Fp8 format = type == CUDA_R_8F_E4M3 ? engine::kE4M3 : engine::kE5M2;
    if (type == CUDA_R_32F) {
        memcpy(first, values, count * sizeof(float));
    } else if (type == CUDA_R_16BF) {
        for (long at = 0; at < count; at++) words[at] = engine::to_bfloat16(values[at]);
    } else if (type == CUDA_R_16F) {
        for (long at = 0; at < count; at++) words[at] = engine::to_float16(values[at]);
    } else {
        for (long at = 0; at < count; at++) codes[at] = engine::to_fp8(values[at], format);
    }
}

// A factor as float32 [outer, k], whichever way it lies: rows are what the product keeps.
std::vector<float> unpacked(const Factor& factor, long outer, long k, bool k_inside, bool tf32) {
    std::vector<float> values(static_cast<size_t>(outer) * k);
    if (k_inside) {
        for (long row = 0; row < outer; row++) {
            read(factor.data, factor.type, row * factor.leading, k, values.data() + row * k);
        }
    } else {
        std::vector<float> line(outer);
        for (long at = 0; at < k; at++) {
            read(factor.data, factor.type, at * factor.leading, outer, line.data());
            for (long row = 0; row < outer; row++) values[row * k + at] = line[row];
        }
    }
    const auto* scales = static_cast<const float*>(factor.scale);
    if (scales && factor.scaling != Factor::kWhole) {
        const long blocks = (k + 127) / 128, wide = (blocks + 3) / 4 * 4, padded = (outer + 3) / 4 * 4;
        const bool vectors = factor.scaling == Factor::kVectors;
        for (long row = 0; row < outer; row++) {
            for (long at = 0; at < k; at++) {
                const long block = at / 128;
                values[row * k + at] *= vectors ? scales[block * padded + row] : scales[row / 128 * wide + block];
            }
        }
    }
    if (tf32) {
        for (float& value : values) value = engine::rounded_to_tf32(value);
    }
    return values;
}

// kHigh rows of the second factor with kWide of the first, both [k, ...]: sums, a row of `out` for each of the second.
void sum_tile(const float* wide, const float* high, long k, float* out) {
    Lane sums[kHigh][kLanes] = {};
    for (long at = 0; at < k; at++) {
        Lane loaded[kLanes];
        for (long lane = 0; lane < kLanes; lane++) {
            loaded[lane] = *reinterpret_cast<const Lane*>(wide + at * kWide + lane * kLane);
        }
        for (long row = 0; row < kHigh; row++) {
            for (long lane = 0; lane < kLanes; lane++) sums[row][lane] += high[at * kHigh + row] * loaded[lane];
        }
    }
    memcpy(out, sums, sizeof sums);
}

// [rows, k] to panels [k, size] of `size` rows each; what is missing of the last is 0.
std::vector<float> in_panels(const std::vector<float>& values, long rows, long k, long size) {
    std::vector<float> panels((rows + size - 1) / size * size * k);
    for (long row = 0; row < rows; row++) {
        float* panel = panels.data() + row / size * size * k + row % size;
        for (long at = 0; at < k; at++) panel[at * size] = values[row * k + at];
    }
    return panels;
}

// The sums, [n, m].
std::vector<float> multiplied(const std::vector<float>& first, const std::vector<float>& second, long m, long n,
                              long k) {
    const auto wide = in_panels(first, m, k, kWide), high = in_panels(second, n, k, kHigh);
    std::vector<float> sums(static_cast<size_t>(m) * n), tile(kHigh * kWide);
    for (long left = 0; left < m; left += kWide) {
        for (long top = 0; top < n; top += kHigh) {
            sum_tile(wide.data() + left * k, high.data() + top * k, k, tile.data());
            for (long row = top; row < std::min(top + kHigh, n); row++) {
                const float* from = tile.data() + (row - top) * kWide;
                std::copy(from, from + std::min(kWide, m - left), sums.data() + row * m + left);
            }
        }
    }
    return sums;
}

float gelu(float x) { return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

float gelu_slope(float x) {
    const float t = std::tanh(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.79788456f * (1 + 3 * 0.044715f * x * x);
}

// One column of the output: what is added, the bias, the activation.
void finish(const Multiplication& asked, long column, float* sums, const std::vector<float>& bias) {
    std::vector<float> other(asked.m);
    if (asked.beta != 0 && asked.added) {
        read(asked.added, asked.added_type, column * asked.added_leading, asked.m, other.data());
        for (long row = 0; row < asked.m; row++) sums[row] += asked.beta * other[row];
    }
    if (asked.bias == Multiplication::kAdded) {
        for (long row = 0; row < asked.m; row++) sums[row] += bias[row];
    }
    if (asked.activation == Multiplication::kIdentity) return;
    const bool backward = asked.activation == Multiplication::kGeluBackward;
    if (backward) {
        read(asked.aux, asked.aux_type, column * asked.aux_leading, asked.m, other.data());
    } else if (asked.aux) {
        write(asked.aux, asked.aux_type, column * asked.aux_leading, asked.m, sums);
    }
    for (long row = 0; row < asked.m; row++) {
        if (asked.activation == Multiplication::kRelu) sums[row] = std::max(sums[row], 0.0f);
        if (asked.activation == Multiplication::kGelu) sums[row] = gelu(sums[row]);
        if (backward) sums[row] *= gelu_slope(other[row]);
    }
}

// What the bias gets as its gradient: sums over a factor's k, or over the output's columns.
void write_bias(const Multiplication& asked, const std::vector<float>& values, long count, bool over_rows) {
    std::vector<double> sums(count);
    const long others = static_cast<long>(values.size()) / count;
    for (long at = 0; at < static_cast<long>(values.size()); at++) sums[over_rows ? at % count : at / others] += values[at];
    const std::vector<float> rounded(sums.begin(), sums.end());
    write(asked.bias_data, asked.bias_type, 0, count, rounded.data());
}

bool known(const Multiplication& asked) {
    for (cudaDataType type : {asked.first.type, asked.second.type, asked.out_type}) {
        if (!bytes_of(type)) {
            null_gpu_complain("a product of type %d cannot be computed", static_cast<int>(type));
            return false;
        }
    }
    // Scales of blocks lie along k, and so must the numbers: on Hopper FP8 is multiplied in no other layout.
    const bool laid = asked.first.transposed && !asked.second.transposed;
    if (!laid && (is_fp8(asked.first.type) || is_fp8(asked.second.type))) {
        null_gpu_complain("a product of FP8 wants its first factor transposed and its second not");
        return false;
    }
    return true;
}

}  // namespace

bool null_gpu_multiply(const Multiplication& asked) {
    if (!known(asked)) return false;
    const auto first = unpacked(asked.first, asked.m, asked.k, asked.first.transposed, asked.tf32);
    const auto second = unpacked(asked.second, asked.n, asked.k, !asked.second.transposed, asked.tf32);
    auto sums = multiplied(first, second, asked.m, asked.n, asked.k);
    float scale = asked.alpha;
    for (const Factor* factor : {&asked.first, &asked.second}) {
        if (factor->scale && factor->scaling == Factor::kWhole) scale *= *static_cast<const float*>(factor->scale);
    }
    for (float& sum : sums) sum *= scale;
    std::vector<float> bias(asked.bias == Multiplication::kAdded ? asked.m : 0);
    if (!bias.empty()) read(asked.bias_data, asked.bias_type, 0, asked.m, bias.data());
    float amax = 0;
    for (long column = 0; column < asked.n; column++) {
        float* line = sums.data() + column * asked.m;
        finish(asked, column, line, bias);
        for (long row = 0; row < asked.m; row++) amax = std::fmax(amax, std::fabs(line[row]));
    }
    if (asked.bias == Multiplication::kSumOfOut) write_bias(asked, sums, asked.m, true);
    if (asked.bias == Multiplication::kSumOfFirst) write_bias(asked, first, asked.m, false);
    if (asked.bias == Multiplication::kSumOfSecond) write_bias(asked, second, asked.n, false);
    if (asked.out_amax) *static_cast<float*>(asked.out_amax) = amax;
    if (is_fp8(asked.out_type) && asked.out_scale) {
        for (float& sum : sums) sum *= *static_cast<const float*>(asked.out_scale);
    }
    for (long column = 0; column < asked.n; column++) {
        write(asked.out, asked.out_type, column * asked.out_leading, asked.m, sums.data() + column * asked.m);
    }
    return true;
}
