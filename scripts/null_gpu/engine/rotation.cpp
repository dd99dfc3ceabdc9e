// Transformer Engine's rotary embeddings (Su et al., arXiv 2104.09864), of one tensor and of queries, keys and values
// in one.

#include <transformer_engine/fused_rope.h>

#include <algorithm>

#include "engine.h"

using engine::Tensor;

namespace {

// Which of the angles' rows a rank's position has, where each of `ranks` holds a chunk from the front and its mirror
// from the back of a sequence, `length` positions of it.
long turned_by(long position, long length, long ranks, long rank, long begin) {
    position += begin;
    if (ranks <= 1) return position;
    const long half = length / 2;
    if (position - begin < half) return position + rank * half;
    return position + length * ranks - (rank + 1) * half - half;
}

// How heads of one position turn.
struct Rotation {
    long depth;                     // of a head
    std::vector<float> cos, sin;    // of its first numbers; the others stay
    bool interleaved, backward;

    Rotation(long depth, const float* angles, long turned, bool interleaved, bool backward)
        : depth(depth), interleaved(interleaved), backward(backward) {
        for (long i = 0; angles && i < turned; i++) {
            cos.push_back(std::cos(angles[i]));
            sin.push_back(std::sin(angles[i]));
        }
    }
};

// One head: out = x cos + rotated(x) sin, and backwards its transpose.
void rotate(const NVTEBasicTensor& from, size_t start, size_t step, const NVTEBasicTensor& to, size_t out_start,
            const Rotation& how) {
    std::vector<float> head(how.depth);
    if (step == 1) {
        engine::read(from, start, how.depth, head.data());
    } else {
        for (long i = 0; i < how.depth; i++) engine::read(from, start + i * step, 1, &head[i]);
    }
    std::vector<float> out = head;
    const long turned = static_cast<long>(how.cos.size()), half = turned / 2;
    for (long i = 0; i < turned; i++) {
        const bool first = how.interleaved ? i % 2 == 0 : i < half;
        const long other = how.interleaved ? (first ? i + 1 : i - 1) : (first ? i + half : i - half);
        const float sine = how.backward ? -how.sin[other] : how.sin[i];
        out[i] = head[i] * how.cos[i] + (first ? -head[other] : head[other]) * sine;
    }
    engine::write(to, out_start, how.depth, out.data());
}

// The angles of a position: a row of those that were given.
const float* angles_of(NVTETensor freqs, long position, long turned) {
    const long rows = static_cast<long>(engine::count_of(Tensor{freqs}.rowwise())) / turned;
    if (position >= rows) {
        engine::refuse("a rotary embedding has angles for " + std::to_string(rows) + " positions and is asked for " +
                       std::to_string(position));
    }
    return Tensor{freqs}.data<float>() + position * turned;
}

// A tensor [s, b, h, d], [b, s, h, d] or [t, h, d] by its strides; the output of the first two has the same order, dense.
struct Layout {
    NVTE_QKV_Format format;
    long s, b, h, d, turned;
    long stride_s, stride_b, stride_h, stride_d;
    bool interleaved;
    long ranks, rank;
};

void rotate_all(NVTETensor input, NVTETensor lengths, NVTETensor freqs, NVTETensor starts, NVTETensor output,
                const Layout& all, bool backward) {
    const NVTEBasicTensor from = Tensor{input}.rowwise(), to = Tensor{output}.rowwise();
    const auto* bounds = lengths ? Tensor{lengths}.data<int>() : nullptr;
    const auto* begins = starts ? Tensor{starts}.data<int>() : nullptr;
    const bool sequence_first = all.format == NVTE_SBHD, packed = all.format == NVTE_THD;
    for (long b = 0; b < all.b; b++) {
        const long first = packed ? bounds[b] / all.ranks : 0;
        const long length = packed ? bounds[b + 1] / all.ranks - first : all.s;
        for (long s = 0; s < std::min(length, all.s); s++) {
            const long angle = turned_by(s, length, all.ranks, all.rank, begins ? begins[b] : 0);
            const size_t start = packed ? (first + s) * all.stride_s : s * all.stride_s + b * all.stride_b;
            const size_t place = packed ? first + s : sequence_first ? s * all.b + b : b * all.s + s;
            const Rotation how(all.d, angles_of(freqs, angle, all.turned), all.turned, all.interleaved, backward);
            for (long h = 0; h < all.h; h++) {
                rotate(from, start + h * all.stride_h, all.stride_d, to, (place * all.h + h) * all.d, how);
            }
        }
    }
}

// Of a row [q | k | v] of one group of heads, the part that lies at `start` and is `length` long.
struct Part {
    NVTEBasicTensor tensor;
    NVTETensor freqs;  // null: it does not turn
    long start, length;
};

struct Fused {
    NVTE_QKV_Format format;
    long s, b, h, d, turned;
    bool interleaved;
    long ranks, rank;
};

void rotate_parts(const NVTEBasicTensor& whole, const std::vector<Part>& parts, NVTETensor starts, const Fused& all,
                  bool backward) {
    const auto* begins = starts ? Tensor{starts}.data<int>() : nullptr;
    const long width = parts.back().start + parts.back().length;
    for (long place = 0; place < all.s * all.b; place++) {
        const long s = all.format == NVTE_SBHD ? place / all.b : place % all.s;
        const long b = all.format == NVTE_SBHD ? place % all.b : place / all.s;
        const long begin = begins && all.ranks <= 1 ? begins[b] : 0;
        const long angle = turned_by(s, all.s, all.ranks, all.rank, begin);
        for (const Part& part : parts) {
            const float* angles = part.freqs ? angles_of(part.freqs, angle, all.turned) : nullptr;
            const Rotation how(all.d, angles, all.turned, all.interleaved, backward);
            for (long h = 0; h < all.h; h++) {
                for (long i = 0; i < part.length; i += all.d) {
                    const size_t inside = (place * all.h + h) * width + part.start + i;
                    const size_t alone = (place * all.h + h) * part.length + i;
                    if (backward) {
                        rotate(part.tensor, alone, 1, whole, inside, how);
                    } else {
                        rotate(whole, inside, 1, part.tensor, alone, how);
                    }
                }
            }
        }
    }
}

NVTETensor if_there(NVTETensor tensor) { return Tensor{tensor}.there() ? tensor : nullptr; }

}  // namespace

extern "C" {

void nvte_fused_rope_forward(const NVTETensor input, const NVTETensor cu_seqlens, const NVTETensor freqs,
                             const NVTETensor start_positions, NVTETensor output, const NVTE_QKV_Format format,
                             const bool interleaved, const int cp_size, const int cp_rank, const int s, const int b,
                             const int h, const int d, const int d2, const int stride_s, const int stride_b,
                             const int stride_h, const int stride_d, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_fused_rope_forward, input, cu_seqlens, freqs, start_positions, output, format, interleaved,
                   cp_size, cp_rank, s, b, h, d, d2, stride_s, stride_b, stride_h, stride_d, stream);
    const Layout all{format,   s,        b,        h,           d,       d2,     stride_s,
                     stride_b, stride_h, stride_d, interleaved, cp_size, cp_rank};
    rotate_all(input, if_there(cu_seqlens), freqs, if_there(start_positions), output, all, false);
}

void nvte_fused_rope_backward(const NVTETensor grads, const NVTETensor cu_seqlens, const NVTETensor freqs,
                              const NVTETensor start_positions, NVTETensor output, const NVTE_QKV_Format format,
                              const bool interleaved, const int cp_size, const int cp_rank, const int s, const int b,
                              const int h, const int d, const int d2, const int stride_s, const int stride_b,
                              const int stride_h, const int stride_d, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_fused_rope_backward, grads, cu_seqlens, freqs, start_positions, output, format, interleaved,
                   cp_size, cp_rank, s, b, h, d, d2, stride_s, stride_b, stride_h, stride_d, stream);
    const Layout all{format,   s,        b,        h,           d,       d2,     stride_s,
                     stride_b, stride_h, stride_d, interleaved, cp_size, cp_rank};
    rotate_all(grads, if_there(cu_seqlens), freqs, if_there(start_positions), output, all, true);
}

void nvte_fused_qkv_rope_forward(const NVTETensor qkv, const NVTETensor q_freqs, const NVTETensor k_freqs,
                                 const NVTETensor start_positions, NVTETensor q, NVTETensor k, NVTETensor v,
                                 const NVTE_QKV_Format format, const bool interleaved, const int cp_size,
                                 const int cp_rank, const int s, const int b, const int h, const int d, const int d2,
                                 const int q_width, const int k_width, const int v_width, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_fused_qkv_rope_forward, qkv, q_freqs, k_freqs, start_positions, q, k, v, format, interleaved,
                   cp_size, cp_rank, s, b, h, d, d2, q_width, k_width, v_width, stream);
    const std::vector<Part> parts{{Tensor{q}.rowwise(), q_freqs, 0, q_width},
                                  {Tensor{k}.rowwise(), k_freqs, q_width, k_width},
                                  {Tensor{v}.rowwise(), nullptr, q_width + k_width, v_width}};
    rotate_parts(Tensor{qkv}.rowwise(), parts, if_there(start_positions),
                 {format, s, b, h, d, d2, interleaved, cp_size, cp_rank}, false);
}

void nvte_fused_qkv_rope_backward(const NVTETensor q, const NVTETensor k, const NVTETensor v,
                                  const NVTETensor q_freqs, const NVTETensor k_freqs, NVTETensor qkv,
                                  const NVTE_QKV_Format format, const bool interleaved, const int cp_size,
                                  const int cp_rank, const int s, const int b, const int h, const int d, const int d2,
                                  const int q_width, const int k_width, const int v_width, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_fused_qkv_rope_backward, q, k, v, q_freqs, k_freqs, qkv, format, interleaved, cp_size, cp_rank,
                   s, b, h, d, d2, q_width, k_width, v_width, stream);
    const std::vector<Part> parts{{Tensor{q}.rowwise(), q_freqs, 0, q_width},
                                  {Tensor{k}.rowwise(), k_freqs, q_width, k_width},
                                  {Tensor{v}.rowwise(), nullptr, q_width + k_width, v_width}};
    rotate_parts(Tensor{qkv}.rowwise(), parts, nullptr, {format, s, b, h, d, d2, interleaved, cp_size, cp_rank}, true);
}

}  // extern "C"
