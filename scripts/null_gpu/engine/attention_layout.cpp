// Attention: where tokens lie, and which of them see which. Follows the layouts and masks of Transformer Engine's
// documentation (fused_attn.h, DotProductAttention).

#include <algorithm>
#include <string>

#include "attention.h"

namespace engine {

namespace {

// Numbers of a tensor whose heads lie alone, or `shared` tensors' side by side: token by token or head by head.
Heads heads(NVTETensor tensor, size_t shared, bool head_by_head) {
    const NVTEBasicTensor memory = Tensor{tensor}.rowwise();
    const size_t ndim = memory.shape.ndim;
    if (ndim < 3) refuse("attention of a tensor of " + std::to_string(ndim) + " dimensions");
    const size_t count = memory.shape.data[ndim - 2], width = memory.shape.data[ndim - 1];
    return {memory, count, width, shared * count * width, head_by_head ? shared * width : width};
}

std::vector<size_t> numbers(NVTETensor tensor) {
    const NVTEBasicTensor memory = Tensor{tensor}.rowwise();
    if (memory.dtype != kNVTEInt32) refuse("lengths of sequences that are not int32");
    const auto* from = static_cast<const int32_t*>(memory.data_ptr);
    return {from, from + count_of(memory)};
}

NVTEBasicTensor at_place(const NVTEBasicTensor& memory, size_t place) {
    NVTEBasicTensor there = memory;
    there.data_ptr = static_cast<char*>(memory.data_ptr) + place * element_bytes(memory.dtype);
    return there;
}

}  // namespace

size_t Sequences::place(size_t sequence, size_t token) const {
    switch (format) {
        case NVTE_SBHD: return token * batch + sequence;
        case NVTE_BSHD: return sequence * length + token;
        default: return first[sequence] + token;
    }
}

std::vector<float> Heads::read(const Sequences& at, size_t sequence, size_t head) const {
    std::vector<float> values(at.room(sequence) * width);
    for (size_t token = 0; token < at.room(sequence); token++) {
        engine::read(at_place(memory, at.place(sequence, token) * per_token + head * per_head), 0, width,
                     values.data() + token * width);
    }
    return values;
}

void Heads::write(const Sequences& at, size_t sequence, size_t head, const std::vector<double>& values) const {
    const std::vector<float> rounded(values.begin(), values.end());
    for (size_t token = 0; token < at.room(sequence); token++) {
        engine::write(at_place(memory, at.place(sequence, token) * per_token + head * per_head), 0, width,
                      rounded.data() + token * width);
    }
}

bool Mask::pads() const {
    return type == NVTE_PADDING_MASK || type == NVTE_PADDING_CAUSAL_MASK ||
           type == NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK;
}

Band Mask::band(size_t query, size_t queries, size_t keys) const {
    const bool top_left = type == NVTE_CAUSAL_MASK || type == NVTE_PADDING_CAUSAL_MASK;
    const bool bottom_right =
        type == NVTE_CAUSAL_BOTTOM_RIGHT_MASK || type == NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK;
    const auto own = static_cast<int64_t>(query) +
                     (bottom_right ? static_cast<int64_t>(keys) - static_cast<int64_t>(queries) : 0);
    const auto all = static_cast<int64_t>(keys);
    const int64_t end = top_left || bottom_right ? std::min(own + 1, all) : all;
    const int64_t begin = left < 0 ? 0 : std::max<int64_t>(own - left, 0);
    if (query >= queries || end <= begin) return {0, 0};
    return {static_cast<size_t>(begin), static_cast<size_t>(end)};
}

Heads Attention::heads_of_queries(NVTETensor tensor) const {
    const auto group = nvte_get_qkv_layout_group(layout);
    return heads(tensor, group == NVTE_3HD || group == NVTE_H3D ? 3 : 1, group == NVTE_H3D);
}

Heads Attention::heads_of_keys(NVTETensor tensor) const {
    switch (nvte_get_qkv_layout_group(layout)) {
        case NVTE_3HD: return heads(tensor, 3, false);
        case NVTE_H3D: return heads(tensor, 3, true);
        case NVTE_HD_2HD: return heads(tensor, 2, false);
        case NVTE_HD_H2D: return heads(tensor, 2, true);
        default: return heads(tensor, 1, false);
    }
}

Heads Attention::heads_of_outputs(NVTETensor tensor) const { return heads(tensor, 1, false); }

void refuse_other_attention(const Asked& asked) {
    const NVTEDType type = Tensor{asked.q}.type();
    if (type != kNVTEBFloat16 && type != kNVTEFloat16) {
        refuse("attention of numbers of type " + std::to_string(type) + " is not computed, of bfloat16 and float16 it is");
    }
    if (asked.dropout != 0.0f) refuse("dropout inside of attention is not computed: attention_dropout=0");
    if (asked.bias != NVTE_NO_BIAS) refuse("attention with a bias is not computed");
    if (asked.softmax != NVTE_VANILLA_SOFTMAX) refuse("attention with an offset in its softmax is not computed");
    if (asked.max_logit) refuse("the largest logits of attention are not computed");
    if (nvte_get_qkv_layout_group(asked.layout) == NVTE_Paged_KV_HD_HD_HD) {
        refuse("attention over pages of keys and values is not computed");
    }
    if (Tensor{asked.k}.type() != type) refuse("queries and keys of different types");
}

Sequences sequences_of(NVTETensor tensor, NVTE_QKV_Format format, bool pads, NVTETensor cu_seqlens,
                       NVTETensor cu_seqlens_padded) {
    const NVTEShape shape = Tensor{tensor}.shape();
    const auto ends = numbers(cu_seqlens);
    Sequences made{format, ends.size() - 1, shape.data[format == NVTE_BSHD ? 1 : 0], {}, {}};
    if (format == NVTE_THD) {
        const auto starts = Tensor{cu_seqlens_padded}.there() ? numbers(cu_seqlens_padded) : ends;
        made.first.assign(starts.begin(), starts.end() - 1);
    } else if (shape.data[format == NVTE_BSHD ? 0 : 1] != made.batch) {
        refuse("rows of attention and lengths of rows differ in number");
    }
    for (size_t sequence = 0; sequence < made.batch; sequence++) {
        const bool whole = format != NVTE_THD && !pads;
        made.count.push_back(whole ? made.length : ends[sequence + 1] - ends[sequence]);
        const size_t start = format == NVTE_THD ? made.first[sequence] : 0;
        if (start > made.length || made.count.back() > made.length - start) {
            refuse("a sequence of attention reaches beyond its tensor");
        }
    }
    return made;
}

}  // namespace engine
