// Where the tokens of an attention's tensors lie, and which of them see which.
#pragma once

#include <transformer_engine/fused_attn.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine.h"

namespace engine {

// The sequences of the queries, or of the keys and values.
struct Sequences {
    NVTE_QKV_Format format;      // NVTE_SBHD, NVTE_BSHD or NVTE_THD
    size_t batch, length;        // sequences, and the tokens that each has room for (of all together: NVTE_THD)
    std::vector<size_t> first;   // NVTE_THD: the first token of each
    std::vector<size_t> count;   // tokens of each; what room is left behind them is padding

    // The place of a sequence's token among all.
    size_t place(size_t sequence, size_t token) const;

    // Tokens that a sequence has room for.
    size_t room(size_t sequence) const { return format == NVTE_THD ? count[sequence] : length; }
};

// One of Q, K, V, O and their gradients.
struct Heads {
    NVTEBasicTensor memory;
    size_t count, width;          // heads, and the numbers of one
    size_t per_token, per_head;   // from a token's first number to the next one's, from a head's to the next one's

    // The numbers of one head of every token of a sequence: [room, width].
    std::vector<float> read(const Sequences& at, size_t sequence, size_t head) const;
    void write(const Sequences& at, size_t sequence, size_t head, const std::vector<double>& values) const;
};

// The keys that a query sees: from `begin` up to `end`, which is not one of them.
struct Band {
    size_t begin, end;
};

struct Mask {
    NVTE_Mask_Type type;
    int64_t left;  // keys before the query's own that it sees; -1: all

    bool pads() const;
    Band band(size_t query, size_t queries, size_t keys) const;
};

// Everything that both directions share.
struct Attention {
    Sequences queries, keys;
    Mask mask;
    float scale;
    NVTE_QKV_Layout layout;

    Heads heads_of_queries(NVTETensor tensor) const;
    Heads heads_of_keys(NVTETensor tensor) const;  // and of values
    Heads heads_of_outputs(NVTETensor tensor) const;
};

// What is not computed here: dropout, biases, other softmaxes, FP8, pages of keys and values.
struct Asked {
    NVTETensor q, k;
    float dropout;
    NVTE_QKV_Layout layout;
    NVTE_Bias_Type bias;
    NVTE_Softmax_Type softmax;
    bool max_logit;
};
void refuse_other_attention(const Asked& asked);

Sequences sequences_of(NVTETensor tensor, NVTE_QKV_Format format, bool pads, NVTETensor cu_seqlens,
                       NVTETensor cu_seqlens_padded);

}  // namespace engine
