"""Tables of PyTorch operators: which are analytic, which have kinks, ties or random values, and where."""

from __future__ import annotations


def names(text: str) -> frozenset[str]:
    """A set of names from a paragraph of them."""
    return frozenset(text.split())


# name of an activation -> (analytic, why not)
ACTIVATIONS: dict[str, tuple[bool, str]] = {
    "identity": (True, ""),
    "softplus": (True, ""),
    "sigmoid": (True, ""),
    "tanh": (True, ""),
    "gelu": (True, ""),
    "silu": (True, ""),
    "mish": (True, ""),
    "log_sigmoid": (True, ""),
    "exp": (True, ""),
    "sin": (True, ""),
    "cos": (True, ""),
    "erf": (True, ""),
    "tanhshrink": (True, ""),
    "square": (True, ""),
    "softsign": (False, "has a second derivative that jumps at 0"),
    "relu": (False, "has a kink at 0"),
    "leaky_relu": (False, "has a kink at 0"),
    "prelu": (False, "has a kink at 0"),
    "rrelu": (False, "has a kink at 0"),
    "elu": (False, "is glued together from two functions at 0"),
    "celu": (False, "is glued together from two functions at 0"),
    "selu": (False, "is glued together from two functions at 0"),
    "hardtanh": (False, "is cut off"),
    "relu6": (False, "is cut off"),
    "hardsigmoid": (False, "is cut off"),
    "hardswish": (False, "is cut off"),
    "hardshrink": (False, "jumps"),
    "softshrink": (False, "has kinks"),
    "threshold": (False, "jumps at the threshold"),
}

ALIASES = {
    "gelu_tanh": "gelu",
    "log_sigmoid_forward": "log_sigmoid",
    "logsigmoid": "log_sigmoid",
    "swish": "silu",
    "prelu_kernel": "prelu",
    "rrelu_with_noise": "rrelu",
    "linear": "identity",
    "none": "identity",
}

KINKS = {
    "abs": "has a kink at 0",
    "clamp": "is cut off",
    "clamp_min": "is cut off",
    "clamp_max": "is cut off",
    "maximum": "has a kink where its arguments are equal",
    "minimum": "has a kink where its arguments are equal",
    "fmax": "has a kink where its arguments are equal",
    "fmin": "has a kink where its arguments are equal",
    "sign": "jumps at 0",
    "sgn": "jumps at 0",
    "heaviside": "jumps at 0",
    "hypot": "has a kink at 0",
    "copysign": "jumps at 0",
    "nan_to_num": "is cut off",
    **dict.fromkeys(
names(
    """
    round floor ceil trunc frac fmod remainder floor_divide argmax argmin
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine bucketize searchsorted
    """
),
        "is a step function",
    ),
    **dict.fromkeys(
names(
    """
    rnn_relu
    """
), "contains relu"),
}  # fmt: skip

TIES = dict.fromkeys(
names(
    """
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d fractional_max_pool3d mkldnn_max_pool2d max min amax amin aminmax median
    nanmedian kthvalue mode topk sort argsort cummax cummin scatter_reduce quantile
    """
),
    "analytic only away from ties",
)  # fmt: skip

# analytic everywhere in all real arguments
ANALYTIC = names(
    """
    linear mm addmm bmm baddbmm addbmm addmv addr matmul mv dot vdot inner outer einsum tensordot kron
    bilinear _trilinear convolution _convolution conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cudnn_convolution mkldnn_convolution thnn_conv2d
    _slow_conv2d_forward slow_conv3d _conv_depthwise2d conv_depthwise3d miopen_convolution
    cudnn_convolution_transpose exp exp2 expm1 sin cos sinh cosh atan asinh erf erfc sinc logaddexp
    logaddexp2 logsumexp logcumsumexp softmax _softmax log_softmax _log_softmax _safe_softmax glu square
    rsub mul add sub neg addcmul sum mean cumsum prod cumprod var var_mean multiply subtract negative
    lerp cross trace avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d view _unsafe_view reshape
    _reshape_alias squeeze unsqueeze flatten unflatten expand permute t transpose numpy_T alias detach
    contiguous clone copy _to_copy to lift_fresh lift _conj resolve_conj real imag view_as_real
    view_as_complex slice select narrow split split_with_sizes chunk unbind unfold im2col col2im index
    index_select gather take take_along_dim scatter scatter_add index_add index_put index_copy
    masked_select diagonal diag diag_embed tril triu cat concat stack hstack vstack repeat
    repeat_interleave tile roll flip rot90 as_strided constant_pad_nd pad reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    pixel_shuffle pixel_unshuffle channel_shuffle movedim swapaxes view_copy expand_copy slice_scatter
    select_scatter upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    scaled_dot_product_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
    _scaled_dot_product_attention_math embedding embedding_bag _embedding_bag
    _embedding_bag_forward_only lstm gru rnn_tanh lstm_cell gru_cell rnn_tanh_cell _thnn_fused_lstm_cell
    _thnn_fused_gru_cell mkldnn_rnn_layer _cudnn_rnn _fft_r2c _fft_c2r _fft_c2c fill zero

    """
)

# no function of real arguments at all: fresh constants, shapes, index arithmetic
CONSTANTS = names(
    """
    zeros ones full empty arange linspace eye zeros_like ones_like full_like empty_like new_zeros
    new_ones new_empty new_full empty_strided new_empty_strided scalar_tensor tril_indices triu_indices
    sym_size sym_numel _local_scalar_dense item is_same_size _has_compatible_shallow_copy_type
    is_nonzero
    """
)

COMPARISONS = names(
    "eq ne lt le gt ge equal isclose isfinite isinf isnan signbit greater less greater_equal less_equal"
)
RANDOM = names(
    """
    native_dropout dropout feature_dropout bernoulli rand randn rand_like randn_like normal uniform
    randint randperm multinomial exponential
    """
)
NORMS = {
    "layer_norm": 4,
    "native_layer_norm": 4,
    "group_norm": 4,
    "native_group_norm": 7,
    "_fused_rms_norm": 3,
}
BATCH_NORMS = names(
    """
    batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _batch_norm_no_update
    _batch_norm_with_update _native_batch_norm_legit_no_training _native_batch_norm_legit
    _native_batch_norm_legit_functional
    """
)
POSITIVE_DOMAIN = names("sqrt rsqrt log log2 log10 reciprocal digamma lgamma")
OPEN_DOMAIN = names(
    """
    linalg_vector_norm norm linalg_norm std std_mean _cdist_forward cdist atan2 acosh acos asin atanh tan
    log1p logit cosine_similarity addcdiv _weight_norm_interface _pairwise_distance
    """
)

SIGN_KEPT = names(
    """
    view _unsafe_view reshape squeeze unsqueeze expand permute t transpose alias detach clone contiguous
    _to_copy slice select split chunk unbind flatten repeat sum mean cumsum sqrt index gather
    """
)
