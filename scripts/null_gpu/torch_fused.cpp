// Operators of torch's that only CUDA has a kernel for: products with another result type, fused attention, RMSNorm;
// and FP8's products, which are slow on a CPU.
//
// Computed in fp32 from their definitions; results are rounded once. Dropout inside attention is refused.

#include "torch_on_host.h"

#include <array>
#include <cmath>
#include <optional>
#include <set>
#include <tuple>

namespace {

using at::Tensor;
using null_gpu::on_card;
using null_gpu::on_host;

Tensor wide(const Tensor& tensor) { return on_host(tensor).to(at::kFloat); }

// Products

Tensor product(const Tensor& left, const Tensor& right, at::ScalarType type) {
    return on_card(at::matmul(wide(left), wide(right)).to(type), left.device());
}

Tensor& product_into(const Tensor& left, const Tensor& right, at::ScalarType, Tensor& out) {
    on_host(out).copy_(at::matmul(wide(left), wide(right)));
    return out;
}

Tensor& added_product_into(const Tensor& added, const Tensor& left, const Tensor& right, at::ScalarType,
                           const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
    auto sum = at::matmul(wide(left), wide(right)).mul_(alpha);
    if (beta.toDouble() != 0) sum.add_(wide(added), beta);
    on_host(out).copy_(sum);
    return out;
}

Tensor added_product(const Tensor& added, const Tensor& left, const Tensor& right, at::ScalarType type,
                     const at::Scalar& beta, const at::Scalar& alpha) {
    auto sizes = left.sizes().vec();
    sizes.back() = right.size(-1);
    auto out = at::empty(sizes, left.options().dtype(type));
    return added_product_into(added, left, right, type, beta, alpha, out);
}

// FP8 with one scale a tensor, or one a row of the left and a column of the right factor; refused where cuBLASLt would.
Tensor& scaled_product_into(const Tensor& left, const Tensor& right, const Tensor& scale_left, const Tensor& scale_right,
                            const std::optional<Tensor>& bias, const std::optional<Tensor>& scale_result,
                            std::optional<at::ScalarType>, bool, Tensor& out) {
    TORCH_CHECK(left.stride(1) == 1 && right.stride(0) == 1, "null GPU: _scaled_mm takes rows and columns");
    TORCH_CHECK(left.size(1) % 16 == 0 && right.size(1) % 16 == 0, "null GPU: _scaled_mm takes multiples of 16");
    TORCH_CHECK(!scale_result || !scale_result->defined(), "null GPU: nothing computes a scaled result");
    auto product = at::mm(wide(left), wide(right)).mul_(wide(scale_left)).mul_(wide(scale_right));
    if (bias && bias->defined()) product.add_(wide(*bias));
    on_host(out).copy_(product);
    return out;
}

Tensor scaled_product(const Tensor& left, const Tensor& right, const Tensor& scale_left, const Tensor& scale_right,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& scale_result,
                      std::optional<at::ScalarType> type, bool fast) {
    auto out = at::empty({left.size(0), right.size(1)}, left.options().dtype(type.value_or(left.scalar_type())));
    return scaled_product_into(left, right, scale_left, scale_right, bias, scale_result, type, fast, out);
}

// Attention: query [b, heads, s, d], key and value [b, groups, t, d]; head h reads group h / (heads / groups).

struct Attention {
    Tensor query, key, value;  // fp32, all with as many heads as the query has
    Tensor scores;             // [b, heads, s, t], masked
    double scale;
    int64_t groups;
};

Tensor repeated(const Tensor& tensor, int64_t heads) { return tensor.repeat_interleave(heads / tensor.size(1), 1); }

Attention scored(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, bool causal,
                 std::optional<double> scale) {
    Attention made;
    made.groups = key.size(1);
    made.query = wide(query);
    made.key = repeated(wide(key), query.size(1));
    made.value = repeated(wide(value), query.size(1));
    made.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(query.size(-1)));
    made.scores = at::matmul(made.query, made.key.transpose(-2, -1)).mul_(made.scale);
    if (bias.defined() && bias.numel()) made.scores.add_(wide(bias));
    if (causal) {
        auto allowed = at::ones({query.size(-2), key.size(-2)}, at::kBool).tril();
        made.scores.masked_fill_(allowed.logical_not(), -INFINITY);
    }
    return made;
}

// As the kernels leave it: [b, heads, s, d] over memory in the order [b, s, heads, d].
Tensor by_row(const Tensor& values, const Tensor& like) {
    auto shape = values.sizes();
    auto out = at::empty({shape[0], shape[2], shape[1], shape[3]}, like.options()).transpose(1, 2);
    on_host(out).copy_(values);
    return out;
}

std::pair<Tensor, Tensor> attended(const Attention& made, const Tensor& like) {
    auto statistics = at::logsumexp(made.scores, {-1});
    auto out = at::matmul(at::softmax(made.scores, -1), made.value);
    return {by_row(out, like), on_card(statistics, like.device())};
}

Tensor of_groups(const Tensor& gradient, int64_t groups) {
    auto shape = gradient.sizes();
    return gradient.reshape({shape[0], groups, shape[1] / groups, shape[2], shape[3]}).sum(2);
}

// The published backward pass of FlashAttention-2 (Dao 2023), on whole matrices.
std::tuple<Tensor, Tensor, Tensor> gradients(const Attention& made, const Tensor& grad_out, const Tensor& out,
                                             const Tensor& statistics, const Tensor& query, const Tensor& key) {
    auto rows = wide(statistics).reshape({query.size(0), query.size(1), -1}).narrow(-1, 0, query.size(-2)).unsqueeze(-1);
    auto probabilities = (made.scores - rows).exp();
    auto upstream = wide(grad_out);
    auto inner = (upstream * wide(out)).sum(-1, true);
    auto of_scores = probabilities * (at::matmul(upstream, made.value.transpose(-2, -1)) - inner) * made.scale;
    auto of_key = at::matmul(of_scores.transpose(-2, -1), made.query);
    auto of_value = at::matmul(probabilities.transpose(-2, -1), upstream);
    return {by_row(at::matmul(of_scores, made.key), query), by_row(of_groups(of_key, made.groups), key),
            by_row(of_groups(of_value, made.groups), key)};
}

void no_dropout(double probability) {
    TORCH_CHECK(probability == 0, "null GPU: nothing computes dropout inside attention");
}

Tensor nothing(const Tensor& like) { return at::zeros({2}, like.options().dtype(at::kLong)); }

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Forward cudnn_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                        bool, double dropout, bool causal, bool, std::optional<double> scale) {
    no_dropout(dropout);
    auto [out, rows] = attended(scored(query, key, value, bias.value_or(Tensor()), causal, scale), query);
    return {out, rows.unsqueeze(-1), Tensor(), Tensor(), query.size(-2), key.size(-2), nothing(query), nothing(query), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> cudnn_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& rows, const Tensor&, const Tensor&, const Tensor& bias, const Tensor&, const Tensor&, c10::SymInt,
    c10::SymInt, double dropout, bool causal, std::optional<double> scale) {
    no_dropout(dropout);
    return gradients(scored(query, key, value, bias, causal, scale), grad_out, out, rows, query, key);
}

Forward flash_attention(const Tensor& query, const Tensor& key, const Tensor& value, double dropout, bool causal, bool,
                        std::optional<double> scale) {
    no_dropout(dropout);
    auto [out, rows] = attended(scored(query, key, value, Tensor(), causal, scale), query);
    return {out, rows, Tensor(), Tensor(), query.size(-2), key.size(-2), nothing(query), nothing(query), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& rows, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal,
    const Tensor&, const Tensor&, std::optional<double> scale) {
    no_dropout(dropout);
    return gradients(scored(query, key, value, Tensor(), causal, scale), grad_out, out, rows, query, key);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(const Tensor& query, const Tensor& key,
                                                               const Tensor& value, const std::optional<Tensor>& bias,
                                                               bool, double dropout, bool causal,
                                                               std::optional<double> scale) {
    no_dropout(dropout);
    auto [out, rows] = attended(scored(query, key, value, bias.value_or(Tensor()), causal, scale), query);
    return {out, rows, nothing(query), nothing(query)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
    const Tensor& out, const Tensor& rows, const Tensor&, const Tensor&, double dropout, std::array<bool, 4> wanted,
    bool causal, std::optional<double> scale) {
    no_dropout(dropout);
    TORCH_CHECK(!wanted[3], "null GPU: nothing computes the gradient of attention's bias");
    auto [of_query, of_key, of_value] =
        gradients(scored(query, key, value, bias, causal, scale), grad_out, out, rows, query, key);
    return {of_query, of_key, of_value, Tensor()};
}

// RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight over the last dimensions.

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, at::IntArrayRef shape, const std::optional<Tensor>& weight,
                                    std::optional<double> eps) {
    std::vector<int64_t> dims;
    for (size_t at = 0; at < shape.size(); at++) dims.push_back(input.dim() - 1 - static_cast<int64_t>(at));
    auto values = wide(input);
    double small = eps ? *eps : std::numeric_limits<float>::epsilon();
    auto inverse = values.square().mean(dims, true).add_(small).rsqrt_();
    auto out = values * inverse;
    if (weight && weight->defined()) out.mul_(wide(*weight));
    return {on_card(out.to(input.scalar_type()).contiguous(), input.device()), on_card(inverse, input.device())};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_out, const Tensor& input, at::IntArrayRef shape,
                                             const Tensor& inverse_std, const std::optional<Tensor>& weight,
                                             std::array<bool, 2> wanted) {
    int64_t size = 1;
    for (int64_t one : shape) size *= one;
    auto flat = wide(input).reshape({-1, size}), upstream = wide(grad_out).reshape({-1, size});
    auto inverse = wide(inverse_std).reshape({-1, 1});
    auto normed = flat * inverse;
    const bool weighted = weight && weight->defined();
    auto inner = weighted ? upstream * wide(*weight).reshape({1, size}) : upstream;
    Tensor of_input, of_weight;
    if (wanted[0]) {
        auto found = inverse * (inner - normed * (inner * normed).mean(-1, true));
        of_input = on_card(found.reshape(input.sizes()).to(input.scalar_type()), input.device());
    }
    if (wanted[1] && weighted) {
        auto found = (upstream * normed).sum(0).reshape(weight->sizes());
        of_weight = on_card(found.to(weight->scalar_type()), input.device());
    }
    return {of_input, of_weight};
}

const std::set<std::string> kWritten = {
    "aten::mm.dtype", "aten::mm.dtype_out", "aten::bmm.dtype", "aten::bmm.dtype_out", "aten::addmm.dtype",
    "aten::_scaled_mm", "aten::_scaled_mm.out", "aten::addmm.dtype_out", "aten::baddbmm.dtype", "aten::baddbmm.dtype_out",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_fused_rms_norm", "aten::_fused_rms_norm_backward",
};

}  // namespace

bool null_gpu::written_here(const std::string& name) { return kWritten.count(name) > 0; }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("mm.dtype", TORCH_FN(product));
    library.impl("mm.dtype_out", TORCH_FN(product_into));
    library.impl("bmm.dtype", TORCH_FN(product));
    library.impl("bmm.dtype_out", TORCH_FN(product_into));
    library.impl("addmm.dtype", TORCH_FN(added_product));
    library.impl("addmm.dtype_out", TORCH_FN(added_product_into));
    library.impl("baddbmm.dtype", TORCH_FN(added_product));
    library.impl("baddbmm.dtype_out", TORCH_FN(added_product_into));
    library.impl("_scaled_mm", TORCH_FN(scaled_product));
    library.impl("_scaled_mm.out", TORCH_FN(scaled_product_into));
    library.impl("_scaled_dot_product_cudnn_attention", TORCH_FN(cudnn_attention));
    library.impl("_scaled_dot_product_cudnn_attention_backward", TORCH_FN(cudnn_attention_backward));
    library.impl("_scaled_dot_product_flash_attention", TORCH_FN(flash_attention));
    library.impl("_scaled_dot_product_flash_attention_backward", TORCH_FN(flash_attention_backward));
    library.impl("_scaled_dot_product_efficient_attention", TORCH_FN(efficient_attention));
    library.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(efficient_attention_backward));
    library.impl("_fused_rms_norm", TORCH_FN(rms_norm));
    library.impl("_fused_rms_norm_backward", TORCH_FN(rms_norm_backward));
}
