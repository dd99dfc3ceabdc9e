// In the place of libtransformer_engine's attention by cuDNN: softmax(scale * q k^T) v, forward and backward, by its
// definition. Of each query the logarithm of the sum of exponentials is kept as cuDNN keeps it (context parallelism
// joins its parts by them), and backward goes by the one that is handed in, which may be of more keys than are here.

#include "attention.h"

#include <cmath>
#include <limits>

namespace {

using engine::Attention;
using engine::Band;
using engine::Heads;
using engine::Sequences;
using engine::Tensor;

// [rows, columns] -> [columns, rows], so that sums over a key's numbers run along neighbours.
std::vector<float> turned(const std::vector<float>& values, size_t columns) {
    const size_t rows = columns ? values.size() / columns : 0;
    std::vector<float> made(values.size());
    for (size_t at = 0; at < values.size(); at++) made[at % columns * rows + at / columns] = values[at];
    return made;
}

// out[j] = sum over c of row[c] * columns[c][j], for the j of the band.
void along(const float* row, const std::vector<float>& columns, size_t width, size_t keys, Band band,
           std::vector<double>& out) {
    for (size_t j = band.begin; j < band.end; j++) out[j] = 0;
    for (size_t c = 0; c < width; c++) {
        const double factor = row[c];
        const float* line = columns.data() + c * keys;
        for (size_t j = band.begin; j < band.end; j++) out[j] += factor * line[j];
    }
}

// to[c] += factor * from[c]
void add(double factor, const float* from, size_t width, double* to) {
    for (size_t c = 0; c < width; c++) to[c] += factor * from[c];
}

// The logarithms of sums of exponentials: [b, h, s, 1], or [t, h, 1].
struct Statistics {
    float* values;
    size_t heads;

    Statistics(NVTETensor tensor, const Sequences& queries, size_t heads)
        : values(Tensor{tensor}.data<float>()), heads(heads) {
        const NVTEShape shape = Tensor{tensor}.shape();
        const bool packed = queries.format == NVTE_THD;
        const size_t wanted = packed ? queries.length * heads : queries.batch * heads * queries.length;
        size_t found = 1;
        for (size_t at = 0; at < shape.ndim; at++) found *= shape.data[at];
        if (!values || found != wanted) engine::refuse("statistics of attention have another shape than cuDNN's");
    }

    float& of(const Sequences& queries, size_t sequence, size_t head, size_t query) const {
        if (queries.format == NVTE_THD) return values[(queries.first[sequence] + query) * heads + head];
        return values[(sequence * heads + head) * queries.length + query];
    }
};

void forward(const Attention& how, const Heads& q, const Heads& k, const Heads& v, const Heads& o,
             const Statistics& statistics, size_t sequence, size_t head) {
    const size_t group = head / (q.count / k.count);
    const size_t queries = how.queries.count[sequence], keys = how.keys.room(sequence);
    const auto rows = q.read(how.queries, sequence, head);
    const auto columns = turned(k.read(how.keys, sequence, group), k.width);
    const auto values = v.read(how.keys, sequence, group);
    std::vector<double> out(how.queries.room(sequence) * v.width), scores(keys);
    for (size_t i = 0; i < how.queries.room(sequence); i++) {
        const Band band = how.mask.band(i, queries, how.keys.count[sequence]);
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        along(rows.data() + i * q.width, columns, q.width, keys, band, scores);
        for (size_t j = band.begin; j < band.end; j++) largest = std::fmax(largest, scores[j] *= how.scale);
        for (size_t j = band.begin; j < band.end; j++) sum += scores[j] = std::exp(scores[j] - largest);
        for (size_t j = band.begin; j < band.end; j++) {
            add(scores[j] / sum, values.data() + j * v.width, v.width, out.data() + i * v.width);
        }
        statistics.of(how.queries, sequence, head, i) = static_cast<float>(largest + std::log(sum));
    }
    o.write(how.queries, sequence, head, out);
}

// What backward reads, and the gradient that each head of queries has for itself.
struct Backward {
    Heads q, k, v, o, d_o, d_q;
};

// One head of queries; adds to the gradients of the keys and values that it shares.
void backward(const Attention& how, const Backward& all, const Statistics& statistics, size_t sequence, size_t head,
              std::vector<double>& d_keys, std::vector<double>& d_values) {
    const auto& [q, k, v, o, d_o, d_q] = all;
    const size_t group = head / (q.count / k.count);
    const size_t queries = how.queries.count[sequence], keys = how.keys.room(sequence);
    const auto rows = q.read(how.queries, sequence, head);
    const auto lines = k.read(how.keys, sequence, group);
    const auto columns = turned(lines, k.width);
    const auto columns_of_values = turned(v.read(how.keys, sequence, group), v.width);
    const auto out = o.read(how.queries, sequence, head), d_out = d_o.read(how.queries, sequence, head);
    std::vector<double> d_rows(rows.size()), share(keys), d_share(keys);
    for (size_t i = 0; i < queries; i++) {
        const Band band = how.mask.band(i, queries, how.keys.count[sequence]);
        const float *row = rows.data() + i * q.width, *d_row = d_out.data() + i * v.width;
        const double statistic = statistics.of(how.queries, sequence, head, i);
        double own = 0;
        for (size_t c = 0; c < v.width; c++) own += static_cast<double>(d_row[c]) * out[i * v.width + c];
        along(row, columns, q.width, keys, band, share);
        along(d_row, columns_of_values, v.width, keys, band, d_share);
        for (size_t j = band.begin; j < band.end; j++) {
            share[j] = std::exp(share[j] * how.scale - statistic);
            const double d_score = share[j] * (d_share[j] - own) * how.scale;
            add(d_score, lines.data() + j * k.width, k.width, d_rows.data() + i * q.width);
            add(d_score, row, q.width, d_keys.data() + j * k.width);
            add(share[j], d_row, v.width, d_values.data() + j * v.width);
        }
    }
    d_q.write(how.queries, sequence, head, d_rows);
}

Attention attention(NVTETensor q, NVTETensor k, NVTETensor cu_seqlens_q, NVTETensor cu_seqlens_kv,
                    NVTETensor cu_seqlens_q_padded, NVTETensor cu_seqlens_kv_padded, float scale,
                    NVTE_QKV_Layout layout, engine::Mask mask) {
    return {engine::sequences_of(q, nvte_get_q_format(layout), mask.pads(), cu_seqlens_q, cu_seqlens_q_padded),
            engine::sequences_of(k, nvte_get_kv_format(layout), mask.pads(), cu_seqlens_kv, cu_seqlens_kv_padded),
            mask, scale, layout};
}

bool only_sizes_are_asked(NVTETensor workspace) { return !Tensor{workspace}.there(); }

}  // namespace

extern "C" {

void nvte_fused_attn_fwd(const NVTETensor Q, const NVTETensor K, const NVTETensor V, const NVTETensor Bias,
                         const NVTETensor SoftmaxOffset, NVTETensor S, NVTETensor O, NVTETensorPack* Aux_CTX_Tensors,
                         const NVTETensor cu_seqlens_q, const NVTETensor cu_seqlens_kv,
                         const NVTETensor cu_seqlens_q_padded, const NVTETensor cu_seqlens_kv_padded,
                         const NVTETensor page_table_k, const NVTETensor page_table_v, const NVTETensor rng_state,
                         size_t max_seqlen_q, size_t max_seqlen_kv, bool is_training, bool return_max_logit,
                         bool cuda_graph, float attn_scale, float dropout, NVTE_QKV_Layout qkv_layout,
                         NVTE_Bias_Type bias_type, NVTE_Mask_Type attn_mask_type, NVTE_Softmax_Type softmax_type,
                         int64_t window_size_left, int64_t window_size_right, NVTETensor workspace,
                         cudaStream_t stream) {
    const bool sizes = only_sizes_are_asked(workspace);
    ENGINE_CHECKED(nvte_fused_attn_fwd, Q, K, V, Bias, SoftmaxOffset, S, O, Aux_CTX_Tensors, cu_seqlens_q,
                   cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded, page_table_k, page_table_v, rng_state,
                   max_seqlen_q, max_seqlen_kv, is_training, return_max_logit, cuda_graph, attn_scale, dropout,
                   qkv_layout, bias_type, attn_mask_type, softmax_type, window_size_left, window_size_right, workspace,
                   stream);
    if (sizes) return;
    engine::refuse_other_attention(
        {Q, K, is_training ? dropout : 0.0f, qkv_layout, bias_type, softmax_type, return_max_logit});
    const Attention how = attention(Q, K, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded,
                                    attn_scale, qkv_layout, {attn_mask_type, window_size_left});
    const Heads q = how.heads_of_queries(Q);
    const Statistics statistics(Aux_CTX_Tensors->tensors[0], how.queries, q.count);
    for (size_t sequence = 0; sequence < how.queries.batch; sequence++) {
        for (size_t head = 0; head < q.count; head++) {
            forward(how, q, how.heads_of_keys(K), how.heads_of_keys(V), how.heads_of_outputs(O), statistics, sequence,
                    head);
        }
    }
}

void nvte_fused_attn_bwd(const NVTETensor Q, const NVTETensor K, const NVTETensor V, const NVTETensor O,
                         const NVTETensor dO, const NVTETensor S, NVTETensor dP, const NVTETensorPack* Aux_CTX_Tensors,
                         NVTETensor dQ, NVTETensor dK, NVTETensor dV, NVTETensor dBias, NVTETensor dSoftmaxOffset,
                         const NVTETensor cu_seqlens_q, const NVTETensor cu_seqlens_kv,
                         const NVTETensor cu_seqlens_q_padded, const NVTETensor cu_seqlens_kv_padded,
                         size_t max_seqlen_q, size_t max_seqlen_kv, float attn_scale, float dropout,
                         NVTE_QKV_Layout qkv_layout, NVTE_Bias_Type bias_type, NVTE_Mask_Type attn_mask_type,
                         NVTE_Softmax_Type softmax_type, int64_t window_size_left, int64_t window_size_right,
                         bool deterministic, bool cuda_graph, NVTETensor workspace, cudaStream_t stream) {
    const bool sizes = only_sizes_are_asked(workspace);
    ENGINE_CHECKED(nvte_fused_attn_bwd, Q, K, V, O, dO, S, dP, Aux_CTX_Tensors, dQ, dK, dV, dBias, dSoftmaxOffset,
                   cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded, max_seqlen_q, max_seqlen_kv,
                   attn_scale, dropout, qkv_layout, bias_type, attn_mask_type, softmax_type, window_size_left,
                   window_size_right, deterministic, cuda_graph, workspace, stream);
    if (sizes) return;
    engine::refuse_other_attention({Q, K, dropout, qkv_layout, bias_type, softmax_type, false});
    const Attention how = attention(Q, K, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded,
                                    attn_scale, qkv_layout, {attn_mask_type, window_size_left});
    const Backward all{how.heads_of_queries(Q),  how.heads_of_keys(K),     how.heads_of_keys(V),
                       how.heads_of_outputs(O), how.heads_of_outputs(dO), how.heads_of_queries(dQ)};
    const Statistics statistics(Aux_CTX_Tensors->tensors[0], how.queries, all.q.count);
    const size_t share = all.q.count / all.k.count;
    for (size_t sequence = 0; sequence < how.queries.batch; sequence++) {
        const size_t room = how.keys.room(sequence);
        for (size_t group = 0; group < all.k.count; group++) {
            std::vector<double> d_keys(room * all.k.width), d_values(room * all.v.width);
            for (size_t head = group * share; head < (group + 1) * share; head++) {
                backward(how, all, statistics, sequence, head, d_keys, d_values);
            }
            how.heads_of_keys(dK).write(how.keys, sequence, group, d_keys);
            how.heads_of_keys(dV).write(how.keys, sequence, group, d_values);
        }
    }
}

// The state of dropout's draws; attention writes it down whether it drops or not.
void nvte_extract_seed_and_offset(int64_t* rng_state_ptr, int captured, int64_t* seed_ptr, uint64_t seed_val,
                                  int64_t* offset_ptr, uint64_t offset_val, uint32_t offset_intragraph,
                                  cudaStream_t) {
    rng_state_ptr[0] = captured ? *seed_ptr : static_cast<int64_t>(seed_val);
    rng_state_ptr[1] = captured ? *offset_ptr + offset_intragraph : static_cast<int64_t>(offset_val);
}

}  // extern "C"
