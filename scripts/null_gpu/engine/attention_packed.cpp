// In the place of libtransformer_engine's help for packed sequences (layout thd): spread over rows (bshd) and back, and
// context parallelism. There a rank holds two pieces of the same length of every sequence, an early one and a late one,
// and most steps of the ring are about one of them.

#include <transformer_engine/fused_attn.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "engine.h"

namespace {

using engine::Tensor;

// Where sequences begin and end, divided: ranks and halves hold equal parts of each.
std::vector<size_t> borders(NVTETensor cu_seqlens, size_t parts) {
    const NVTEBasicTensor memory = Tensor{cu_seqlens}.rowwise();
    if (memory.dtype != kNVTEInt32) engine::refuse("lengths of sequences that are not int32");
    const auto* from = static_cast<const int32_t*>(memory.data_ptr);
    std::vector<size_t> made;
    for (size_t at = 0; at < engine::count_of(memory); at++) made.push_back(static_cast<size_t>(from[at]) / parts);
    return made;
}

// [..., t, heads, width] as lines of one token.
struct Tokens {
    NVTEBasicTensor memory;
    size_t outer, count, line;

    explicit Tokens(NVTETensor tensor) : memory(Tensor{tensor}.rowwise()), outer(1) {
        const NVTEShape& shape = memory.shape;
        if (shape.ndim != 3 && shape.ndim != 4) engine::refuse("packed sequences of other than 3 or 4 dimensions");
        if (shape.ndim == 4) outer = shape.data[0];
        count = shape.data[shape.ndim - 3];
        line = shape.data[shape.ndim - 2] * shape.data[shape.ndim - 1];
    }

    size_t bytes() const { return line * engine::element_bytes(memory.dtype); }
    char* at(size_t block, size_t token) const {
        return static_cast<char*>(memory.data_ptr) + (block * count + token) * bytes();
    }
    void copy(size_t block, size_t token, const Tokens& from, size_t other) const {
        memcpy(at(block, token), from.at(block, other), bytes());
    }
    void add(size_t block, size_t token, const Tokens& from, size_t other) const {
        std::vector<float> mine(line), theirs(line);
        engine::read(memory, (block * count + token) * line, line, mine.data());
        engine::read(from.memory, (block * from.count + other) * line, line, theirs.data());
        for (size_t place = 0; place < line; place++) mine[place] += theirs[place];
        engine::write(memory, (block * count + token) * line, line, mine.data());
    }
};

// Logarithms of sums of exponentials: [heads, t] packed, or [sequences, heads, longest].
struct Statistics {
    float* values;
    size_t heads, length;
    bool packed;

    Statistics(NVTETensor tensor, bool packed) : packed(packed) {
        const NVTEBasicTensor memory = Tensor{tensor}.rowwise();
        if (memory.dtype != kNVTEFloat32 || memory.shape.ndim != (packed ? 2 : 3)) {
            engine::refuse("statistics of attention of another type or shape");
        }
        values = static_cast<float*>(memory.data_ptr);
        heads = memory.shape.data[packed ? 0 : 1];
        length = memory.shape.data[packed ? 1 : 2];
    }

    // `start` is where the sequence begins among all.
    float& of(size_t sequence, size_t head, size_t start, size_t token) const {
        return values[packed ? head * length + start + token : (sequence * heads + head) * length + token];
    }
};

// Every sequence's numbers: packed ones, and those of its row, which is longer.
template <class Copy>
void each_beside_its_row(NVTETensor packed, NVTETensor rows, NVTETensor cu_seqlens, Copy copy) {
    const Tokens from(packed), to(rows);
    const auto ends = borders(cu_seqlens, 1);
    for (size_t sequence = 0; sequence + 1 < ends.size(); sequence++) {
        const size_t length = ends[sequence + 1] - ends[sequence];
        if (length > to.count) engine::refuse("a sequence is longer than its row");
        copy(from.at(0, ends[sequence]), to.at(sequence, 0), length * from.bytes());
    }
}

// Calls visit(sequence, where it begins in halves, its tokens in a half, a token of the half) for each.
template <class Visit>
void each_of_halves(NVTETensor cu_seqlens, Visit visit) {
    const auto ends = borders(cu_seqlens, 2);
    for (size_t sequence = 0; sequence + 1 < ends.size(); sequence++) {
        const size_t half = ends[sequence + 1] - ends[sequence];
        for (size_t token = 0; token < half; token++) visit(sequence, ends[sequence], half, token);
    }
}

// out += part * exp(statistic of the part - statistic of all), each rounded to the tensor's type.
void add_weighed(NVTETensor out, NVTETensor part, size_t token, size_t other, size_t head, double weight) {
    const NVTEBasicTensor to = Tensor{out}.rowwise(), from = Tensor{part}.rowwise();
    const size_t heads = to.shape.data[1], width = to.shape.data[2];
    std::vector<float> sum(width), share(width);
    engine::read(to, (token * heads + head) * width, width, sum.data());
    engine::read(from, (other * heads + head) * width, width, share.data());
    for (float& value : share) value = value == 0.0f ? 0.0f : static_cast<float>(value * weight);
    std::vector<char> rounded(width * engine::element_bytes(to.dtype));
    const NVTEBasicTensor between{rounded.data(), to.dtype, {{width}, 1}};
    engine::write(between, 0, width, share.data());
    engine::read(between, 0, width, share.data());
    for (size_t place = 0; place < width; place++) sum[place] += share[place];
    engine::write(to, (token * heads + head) * width, width, sum.data());
}

void change(const std::string& how, const Tokens& grad, const Tokens& part, size_t token, size_t other) {
    for (size_t block = 0; block < grad.outer; block++) {
        if (how == "add") grad.add(block, token, part, other);
        else if (how == "copy") grad.copy(block, token, part, other);
        else if (how != "none") engine::refuse("gradients of packed sequences are not joined by " + how);
    }
}

}  // namespace

extern "C" {

void nvte_convert_thd_to_bshd(NVTETensor tensor, NVTETensor cu_seqlens, NVTETensor new_tensor, int b, int max_seq_len,
                              cudaStream_t stream) {
    ENGINE_CHECKED(nvte_convert_thd_to_bshd, tensor, cu_seqlens, new_tensor, b, max_seq_len, stream);
    each_beside_its_row(tensor, new_tensor, cu_seqlens,
                        [](char* packed, char* row, size_t bytes) { memcpy(row, packed, bytes); });
}

void nvte_convert_bshd_to_thd(NVTETensor tensor, NVTETensor cu_seqlens, NVTETensor new_tensor, int t,
                              cudaStream_t stream) {
    ENGINE_CHECKED(nvte_convert_bshd_to_thd, tensor, cu_seqlens, new_tensor, t, stream);
    each_beside_its_row(new_tensor, tensor, cu_seqlens,
                        [](char* packed, char* row, size_t bytes) { memcpy(packed, row, bytes); });
}

void nvte_cp_thd_read_half_tensor(const NVTETensor& tensor, const NVTETensor& cu_seqlens, NVTETensor half, int half_idx,
                                  cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cp_thd_read_half_tensor, tensor, cu_seqlens, half, half_idx, stream);
    const Tokens from(tensor), to(half);
    each_of_halves(cu_seqlens, [&](size_t, size_t start, size_t count, size_t token) {
        for (size_t block = 0; block < from.outer; block++) {
            to.copy(block, start + token, from, 2 * start + (half_idx ? count : 0) + token);
        }
    });
}

void nvte_cp_thd_second_half_lse_correction(NVTETensor lse, const NVTETensor& lse_per_step,
                                            const NVTETensor& cu_seqlens, int lse_packed, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cp_thd_second_half_lse_correction, lse, lse_per_step, cu_seqlens, lse_packed, stream);
    const Statistics all(lse, lse_packed), part(lse_per_step, lse_packed);
    each_of_halves(cu_seqlens, [&](size_t sequence, size_t start, size_t count, size_t token) {
        for (size_t head = 0; head < all.heads; head++) {
            float& sum = all.of(sequence, head, 2 * start, count + token);
            const double more = part.of(sequence, head, start, token), larger = std::fmax(sum, more);
            sum = static_cast<float>(larger + std::log1p(std::exp(std::fmin(sum, more) - larger)));
        }
    });
}

void nvte_cp_thd_read_second_half_lse(const NVTETensor& lse, const NVTETensor& cu_seqlens, NVTETensor half_lse,
                                      int lse_packed, int second_half_lse_seqlen, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cp_thd_read_second_half_lse, lse, cu_seqlens, half_lse, lse_packed, second_half_lse_seqlen,
                   stream);
    const Statistics all(lse, lse_packed), half(half_lse, lse_packed);
    each_of_halves(cu_seqlens, [&](size_t sequence, size_t start, size_t count, size_t token) {
        for (size_t head = 0; head < all.heads; head++) {
            half.of(sequence, head, start, token) = all.of(sequence, head, 2 * start, count + token);
        }
    });
}

void nvte_cp_thd_out_correction(NVTETensor out, const NVTETensor& out_per_step, const NVTETensor& lse,
                                const NVTETensor& lse_per_step, const NVTETensor& cu_seqlens, int only_second_half,
                                int lse_packed, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cp_thd_out_correction, out, out_per_step, lse, lse_per_step, cu_seqlens, only_second_half,
                   lse_packed, stream);
    const Statistics all(lse, lse_packed), part(lse_per_step, lse_packed);
    const auto ends = borders(cu_seqlens, 1);
    const size_t pieces = only_second_half ? 2 : 1;
    for (size_t sequence = 0; sequence + 1 < ends.size(); sequence++) {
        const size_t start = ends[sequence], length = ends[sequence + 1] - start, skipped = length - length / pieces;
        for (size_t token = 0; token < length / pieces; token++) {
            for (size_t head = 0; head < all.heads; head++) {
                const double weight = std::exp(part.of(sequence, head, start / pieces, token) -
                                               static_cast<double>(all.of(sequence, head, start, skipped + token)));
                add_weighed(out, out_per_step, start + skipped + token, start / pieces + token, head, weight);
            }
        }
    }
}

void nvte_cp_thd_grad_correction(NVTETensor grad, const NVTETensor& grad_per_step, const NVTETensor& cu_seqlens,
                                 const char* first_half, const char* second_half, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cp_thd_grad_correction, grad, grad_per_step, cu_seqlens, first_half, second_half, stream);
    const Tokens all(grad), part(grad_per_step);
    const std::string first = first_half, second = second_half;
    const bool halves = first == "none" || second == "none";
    each_of_halves(cu_seqlens, [&](size_t, size_t start, size_t count, size_t token) {
        const size_t early = 2 * start + token, late = early + count;
        change(first, all, part, early, halves ? start + token : early);
        change(second, all, part, late, halves ? start + token : late);
    });
}

void nvte_cp_thd_get_partitioned_indices(const NVTETensor& cu_seqlens, NVTETensor output, int total_tokens,
                                         int world_size, int rank, cudaStream_t stream) {
    ENGINE_CHECKED(nvte_cp_thd_get_partitioned_indices, cu_seqlens, output, total_tokens, world_size, rank, stream);
    const auto pieces = static_cast<size_t>(2 * world_size), own = static_cast<size_t>(rank);
    const auto ends = borders(cu_seqlens, 1);
    auto* next = Tensor{output}.data<int32_t>();
    for (size_t sequence = 0; sequence + 1 < ends.size(); sequence++) {
        const size_t length = (ends[sequence + 1] - ends[sequence]) / pieces;
        for (const size_t piece : {own, pieces - 1 - own}) {
            for (size_t token = 0; token < length; token++) {
                *next++ = static_cast<int32_t>(ends[sequence] + piece * length + token);
            }
        }
    }
}

}  // extern "C"
