// Numbers as a card's memory holds them: float32, float16, bfloat16, and FP8's E4M3 and E5M2, read as float and written
// with a card's rounding (to the nearest, ties to even; FP8 stops at its largest value, as CUDA's satfinite does).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace engine {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bfloat16(uint16_t stored) { return float_of(static_cast<uint32_t>(stored) << 16); }

inline uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // stays no number
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t stored) {
    _Float16 value;
    memcpy(&value, &stored, sizeof value);
    return static_cast<float>(value);
}

inline uint16_t to_float16(float value) {
    auto half = static_cast<_Float16>(value);
    uint16_t stored;
    memcpy(&stored, &half, sizeof stored);
    return stored;
}

// What tensor cores keep of a float32 in a product by TF32: ten bits behind the point.
inline float rounded_to_tf32(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7f800000) == 0x7f800000) return value;
    return float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

// One of the two formats of FP8 (Micikevicius et al., arXiv 2209.05433).
struct Fp8 {
    int mantissa, bias;
    float largest;
    uint8_t largest_code;
};

constexpr Fp8 kE4M3{3, 7, 448.0f, 0x7e};
constexpr Fp8 kE5M2{2, 15, 57344.0f, 0x7b};

inline uint8_t to_fp8(float value, const Fp8& format) {
    uint32_t bits = bits_of(value);
    auto sign = static_cast<uint8_t>(bits >> 24 & 0x80);
    float size = float_of(bits & 0x7fffffff);
    if (std::isnan(value)) return 0x7f;
    if (size >= format.largest) return sign | format.largest_code;
    int exponent = static_cast<int>(bits >> 23 & 0xff) - 127;
    int smallest = 1 - format.bias;
    if (exponent < smallest) exponent = smallest;
    // In units of the last place there; the carry of a rounding up runs into the exponent by itself.
    float units = size * float_of(static_cast<uint32_t>(format.mantissa - exponent + 127) << 23);
    auto whole = static_cast<uint32_t>(std::nearbyint(units));
    return static_cast<uint8_t>(sign | (((exponent - smallest) << format.mantissa) + whole));
}

inline float from_fp8(uint8_t code, const Fp8& format) {
    int exponent = (code & 0x7f) >> format.mantissa;
    int mantissa = code & ((1 << format.mantissa) - 1);
    bool e5m2 = format.mantissa == 2;
    float size;
    if (e5m2 && exponent == 31) {
        size = mantissa ? NAN : INFINITY;
    } else if (!e5m2 && (code & 0x7f) == 0x7f) {
        size = NAN;
    } else if (exponent == 0) {
        size = std::ldexp(static_cast<float>(mantissa), 1 - format.bias - format.mantissa);
    } else {
        size = std::ldexp(static_cast<float>(mantissa + (1 << format.mantissa)),
                          exponent - format.bias - format.mantissa);
    }
    return code & 0x80 ? -size : size;
}

// The 256 values of a format, for reading many.
struct Fp8Table {
    float values[256];
    explicit Fp8Table(const Fp8& format) {
        for (int code = 0; code < 256; code++) values[code] = from_fp8(static_cast<uint8_t>(code), format);
    }
};

inline const float* fp8_values(bool e4m3) {
    static const Fp8Table first(kE4M3), second(kE5M2);
    return e4m3 ? first.values : second.values;
}

}  // namespace engine
