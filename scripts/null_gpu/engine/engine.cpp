#include "engine.h"

#include <dlfcn.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace engine {

namespace {

const size_t kBlock = 128;

using Note = void (*)(int);

// libcudart's count of reasons to leave out a launch in silence; where it has none, launches do nothing anyway.
void replaced(int change) {
    static auto note = reinterpret_cast<Note>(dlsym(RTLD_DEFAULT, "null_gpu_replaced"));
    if (note) note(change);
}

NVTEBasicTensor part_at(const NVTEBasicTensor& whole, size_t start) {
    NVTEBasicTensor part = whole;
    part.data_ptr = static_cast<char*>(whole.data_ptr) + start * element_bytes(whole.dtype);
    return part;
}

float largest_size(const float* values, size_t count) {
    float largest = 0;
    for (size_t at = 0; at < count; at++) largest = std::fmax(largest, std::fabs(values[at]));
    return largest;
}

// One scale for the whole tensor, which is there already.
void store_by_tensor(const Tensor& out, const Matrix& values) {
    const NVTEBasicTensor row = out.rowwise(), column = out.columnwise();
    const float scale = out.scale() ? *out.scale() : 1.0f;
    Matrix scaled = values;
    for (float& value : scaled.values) value *= scale;
    if (row.data_ptr) write(row, 0, scaled.values.size(), scaled.values.data());
    if (column.data_ptr) write(column, 0, scaled.values.size(), scaled.transposed().values.data());
    for (NVTETensorParam which : {kNVTERowwiseScaleInv, kNVTEColumnwiseScaleInv}) {
        auto* inverse = static_cast<float*>(out.part(which).data_ptr);
        if (inverse) *inverse = 1.0f / scale;
    }
}

// The blocks of a matrix that have a scale each, and where the scale of block (i, j) lies: i * down + j * across.
struct Blocks {
    size_t high, wide;
    size_t down, across;
};

void store_in_blocks(const NVTEBasicTensor& data, void* inverses, const Matrix& values, const Blocks& blocks,
                     const Quantization& how) {
    const float largest = fp8_format(data.dtype).largest;
    std::vector<float> line(blocks.wide);
    for (size_t top = 0; top < values.rows; top += blocks.high) {
        for (size_t left = 0; left < values.columns; left += blocks.wide) {
            const size_t bottom = std::min(top + blocks.high, values.rows);
            const size_t width = std::min(blocks.wide, values.columns - left);
            float amax = 0;
            for (size_t row = top; row < bottom; row++) {
                amax = std::fmax(amax, largest_size(values.row(row) + left, width));
            }
            const float scale = scale_from_amax(amax, largest, how.powers_of_two, how.epsilon, how.largest_input);
            const size_t place = top / blocks.high * blocks.down + left / blocks.wide * blocks.across;
            static_cast<float*>(inverses)[place] = 1.0f / scale;
            for (size_t row = top; row < bottom; row++) {
                for (size_t at = 0; at < width; at++) line[at] = values.row(row)[left + at] * scale;
                write(data, row * values.columns + left, width, line.data());
            }
        }
    }
}

// Rowwise: blocks along a row, for products that sum over columns. Columnwise: blocks along a column, and the matrix
// turned. For products, scales of one row's blocks lie apart by the rows of all; compact ones lie as the blocks do.
void store_by_blocks(const Tensor& out, const Matrix& values, const Quantization& how) {
    const bool square = out.mode() == NVTE_BLOCK_SCALING_2D;
    const size_t high = square ? kBlock : 1;
    const NVTEBasicTensor row = out.rowwise(), column = out.columnwise();
    if (row.data_ptr) {
        const NVTEBasicTensor inverse = out.part(kNVTERowwiseScaleInv);
        const size_t stride = inverse.shape.data[1];
        const bool as_they_lie = square || how.compact;
        store_in_blocks(row, inverse.data_ptr, values,
                        {high, kBlock, as_they_lie ? stride : 1, as_they_lie ? 1 : stride}, how);
    }
    if (column.data_ptr) {
        const NVTEBasicTensor inverse = out.part(kNVTEColumnwiseScaleInv);
        const size_t stride = inverse.shape.data[1];
        if (how.compact && !square) {
            store_in_blocks(column, inverse.data_ptr, values, {kBlock, 1, stride, 1}, how);
        } else {
            store_in_blocks(column, inverse.data_ptr, values.transposed(),
                            {high, kBlock, square ? stride : 1, square ? 1 : stride}, how);
        }
    }
}

}  // namespace

void refuse(const std::string& why) { throw std::runtime_error("null GPU: " + why); }

void* real_function(const char* name) {
    static void* library = dlopen("libtransformer_engine.so", RTLD_NOW | RTLD_NOLOAD);
    if (!library) refuse("libtransformer_engine.so is not loaded");
    void* found = dlsym(library, name);
    if (!found) refuse(std::string("libtransformer_engine.so has no ") + name);
    return found;
}

Replaced::Replaced() { replaced(1); }
Replaced::~Replaced() { replaced(-1); }

size_t element_bytes(NVTEDType type) {
    switch (type) {
        case kNVTEInt64: return 8;
        case kNVTEInt32:
        case kNVTEFloat32: return 4;
        case kNVTEInt16:
        case kNVTEFloat16:
        case kNVTEBFloat16: return 2;
        case kNVTEByte:
        case kNVTEFloat8E4M3:
        case kNVTEFloat8E5M2:
        case kNVTEFloat8E8M0: return 1;
        default: refuse("elements of type " + std::to_string(type) + " have no size here");
    }
}

bool is_fp8(NVTEDType type) { return type == kNVTEFloat8E4M3 || type == kNVTEFloat8E5M2; }

const Fp8& fp8_format(NVTEDType type) {
    if (!is_fp8(type)) refuse("type " + std::to_string(type) + " is not FP8");
    return type == kNVTEFloat8E4M3 ? kE4M3 : kE5M2;
}

size_t count_of(const NVTEBasicTensor& tensor) {
    size_t count = 1;
    for (size_t at = 0; at < tensor.shape.ndim; at++) count *= tensor.shape.data[at];
    return count;
}

void read(const NVTEBasicTensor& from, size_t start, size_t count, float* out) {
    const void* first = part_at(from, start).data_ptr;
    const auto* words = static_cast<const uint16_t*>(first);
    const auto* bytes = static_cast<const uint8_t*>(first);
    switch (from.dtype) {
        case kNVTEFloat32: memcpy(out, first, count * sizeof(float)); break;
        case kNVTEFloat16:
            for (size_t at = 0; at < count; at++) out[at] = from_float16(words[at]);
            break;
        case kNVTEBFloat16:
            for (size_t at = 0; at < count; at++) out[at] = from_bfloat16(words[at]);
            break;
        case kNVTEFloat8E4M3:
        case kNVTEFloat8E5M2: {
            const float* values = fp8_values(from.dtype == kNVTEFloat8E4M3);
            for (size_t at = 0; at < count; at++) out[at] = values[bytes[at]];
            break;
        }
        default: refuse("type " + std::to_string(from.dtype) + " cannot be read");
    }
}

std::vector<float> read(const NVTEBasicTensor& from) {
    std::vector<float> values(count_of(from));
    read(from, 0, values.size(), values.data());
    return values;
}

void write(const NVTEBasicTensor& to, size_t start, size_t count, const float* values) {
    void* first = part_at(to, start).data_ptr;
    auto* words = static_cast<uint16_t*>(first);
    auto* bytes = static_cast<uint8_t*>(first);
    switch (to.dtype) {
        case kNVTEFloat32: memcpy(first, values, count * sizeof(float)); break;
        case kNVTEFloat16:
            for (size_t at = 0; at < count; at++) words[at] = to_float16(values[at]);
            break;
        case kNVTEBFloat16:
            for (size_t at = 0; at < count; at++) words[at] = to_bfloat16(values[at]);
            break;
        case kNVTEFloat8E4M3:
        case kNVTEFloat8E5M2: {
            const Fp8 format = fp8_format(to.dtype);
            for (size_t at = 0; at < count; at++) bytes[at] = to_fp8(values[at], format);
            break;
        }
        default: refuse("type " + std::to_string(to.dtype) + " cannot be written");
    }
}

size_t Tensor::columns() const {
    const NVTEShape whole = shape();
    return whole.ndim ? whole.data[whole.ndim - 1] : 1;
}

size_t Tensor::rows() const {
    const NVTEShape whole = shape();
    size_t count = 1;
    for (size_t at = 0; at + 1 < whole.ndim; at++) count *= whole.data[at];
    return count;
}

Matrix Tensor::values() const {
    const NVTEBasicTensor row = rowwise();
    if (!row.data_ptr && count_of(row)) refuse("a tensor is read that has no rowwise values");
    Matrix found(rows(), columns());
    auto& values = found.values;
    read(row, 0, values.size(), values.data());
    if (!is_fp8(row.dtype)) return found;
    const NVTEBasicTensor inverse = part(kNVTERowwiseScaleInv);
    const auto* inverses = static_cast<const float*>(inverse.data_ptr);
    if (mode() == NVTE_DELAYED_TENSOR_SCALING) {
        for (float& value : values) value *= *inverses;
        return found;
    }
    if (mode() != NVTE_BLOCK_SCALING_1D && mode() != NVTE_BLOCK_SCALING_2D) {
        refuse("scaling mode " + std::to_string(mode()) + " cannot be read");
    }
    const bool square = mode() == NVTE_BLOCK_SCALING_2D;
    const size_t width = found.columns, stride = inverse.shape.data[1];
    for (size_t at = 0; at < values.size(); at++) {
        const size_t i = at / width, j = at % width / kBlock;
        values[at] *= square ? inverses[i / kBlock * stride + j] : inverses[j * stride + i];
    }
    return found;
}

Quantization::Quantization(NVTEQuantizationConfig config) {
    if (!config) return;
    size_t written = 0;
    NVTETensor flag = nullptr;
    int format = 0;
    nvte_get_quantization_config_attribute(config, kNVTEQuantizationConfigForcePow2Scales, &powers_of_two,
                                           sizeof powers_of_two, &written);
    nvte_get_quantization_config_attribute(config, kNVTEQuantizationConfigAmaxEpsilon, &epsilon, sizeof epsilon,
                                           &written);
    nvte_get_quantization_config_attribute(config, kNVTEQuantizationConfigNoopTensor, &flag, sizeof flag, &written);
    nvte_get_quantization_config_attribute(config, kNVTEQuantizationConfigFloat8BlockScaleTensorFormat, &format,
                                           sizeof format, &written);
    compact = format == static_cast<int>(transformer_engine::Float8BlockScaleTensorFormat::COMPACT);
    if (flag) noop = Tensor{flag}.data<float>();
}

float largest_of(NVTEDType type) {
    switch (type) {
        case kNVTEFloat32: return std::numeric_limits<float>::max();
        case kNVTEBFloat16: return from_bfloat16(0x7f7f);
        case kNVTEFloat16: return 65504.0f;
        default: return fp8_format(type).largest;
    }
}

float scale_from_amax(float amax, float largest, bool powers_of_two, float epsilon, float instead_of_infinity) {
    if (amax < epsilon) amax = epsilon;
    if (std::isinf(amax) || std::isnan(amax) || amax == 0.0f) return 1.0f;
    float scale = largest / amax;
    if (std::isinf(scale)) scale = instead_of_infinity;
    return powers_of_two ? float_of(bits_of(scale) & 0xff800000u) : scale;
}

void store(const Tensor& out, const Matrix& values, const Quantization& how) {
    if (how.skipped() || values.values.empty()) return;
    const size_t count = values.values.size(), room = out.rows() * out.columns();
    if (count != room) refuse(std::to_string(count) + " values for a tensor of " + std::to_string(room));
    if (out.mode() == NVTE_BLOCK_SCALING_1D || out.mode() == NVTE_BLOCK_SCALING_2D) {
        store_by_blocks(out, values, how);
        return;
    }
    if (out.mode() != NVTE_DELAYED_TENSOR_SCALING) {
        refuse("scaling mode " + std::to_string(out.mode()) + " cannot be written");
    }
    float* amax = out.amax();
    if (is_fp8(out.type())) {
        if (amax) *amax = std::fmax(*amax, largest_size(values.values.data(), count));
        store_by_tensor(out, values);
        return;
    }
    write(out.rowwise(), 0, count, values.values.data());
    if (amax) *amax = std::fmax(*amax, largest_size(read(out.rowwise()).data(), count));  // of what was rounded
}

Matrix Matrix::transposed() const {
    Matrix turned(columns, rows);
    for (size_t at = 0; at < rows; at++) {
        for (size_t column = 0; column < columns; column++) turned.values[column * rows + at] = row(at)[column];
    }
    return turned;
}

}  // namespace engine
