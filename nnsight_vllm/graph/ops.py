"""The closed table of operations that a graph may name.

Names are namespaced by where the operation comes from, so that a name has one meaning: `tensor.` a method of
`torch.Tensor`, `torch.` a function of `torch`, `nn.` of `torch.nn.functional`, `linalg.` and `special.` of those
modules, `py.` Python's own operators and containers, written out in the executor, `edit.` the edits of `nnsight_vllm.edits`.
What isn't listed doesn't exist:
no operation reads memory it didn't write (`empty`), leaves the tensor world (`numpy`, `data_ptr`) or touches files.
"""

from __future__ import annotations

_TENSOR = """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arccos
arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort asin asinh atan atan2 atanh baddbmm bernoulli
bfloat16 bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm bool
broadcast_to ceil chunk clamp clamp_max clamp_min clip clone contiguous copysign corrcoef cos cosh
count_nonzero cov cpu cross cummax cummin cumprod cumsum deg2rad det detach diag diag_embed diagflat diagonal
diagonal_scatter diff digamma dim dist div divide dot double dsplit eq equal erf erfc erfinv exp exp2 expand
expand_as expm1 fix flatten flip fliplr flipud float float_power floor floor_divide fmax fmin fmod frac gather gcd ge
greater greater_equal gt half heaviside histc hsplit hypot index_add index_copy index_fill index_put index_reduce
index_select inner int inverse is_floating_point isclose isfinite isinf isnan isneginf isposinf isreal item
kron kthvalue lcm le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp
logdet logical_and logical_not logical_or logical_xor logit logsumexp long lt masked_fill masked_scatter
masked_select matmul matrix_exp matrix_power max maximum mean median min minimum mm mode moveaxis movedim msort mul
multinomial multiply mv nan_to_num nanmean nanmedian nanquantile nansum narrow narrow_copy ndimension ne neg negative
new_full new_ones new_tensor new_zeros nextafter nonzero norm not_equal numel outer permute pinverse polygamma positive
pow prod put quantile rad2deg ravel reciprocal relu remainder renorm repeat repeat_interleave reshape reshape_as roll
rot90 round rsqrt scatter scatter_add scatter_reduce select select_scatter short sigmoid sign signbit sin sinc sinh
size slice_scatter softmax sort split split_with_sizes sqrt square squeeze std sub subtract sum sum_to_size svd
swapaxes swapdims t take take_along_dim tan tanh tensor_split tile to tolist topk trace transpose tril triu
true_divide trunc type_as unbind unflatten unfold unique unique_consecutive unsqueeze var view view_as vsplit
where xlogy T mT H mH real
abs_ absolute_ acos_ add_ addcdiv_ addcmul_ addmm_ addmv_ asin_ atan_ atan2_ bernoulli_ bitwise_and_ bitwise_not_
bitwise_or_ bitwise_xor_ ceil_ clamp_ clamp_max_ clamp_min_ clip_ copy_ copysign_ cos_ cosh_ cumprod_ cumsum_ deg2rad_
digamma_ div_ divide_ eq_ erf_ erfc_ erfinv_ exp_ exp2_ expm1_ exponential_ fill_ fill_diagonal_ fix_ float_power_
floor_ floor_divide_ fmod_ frac_ ge_ gt_ heaviside_ hypot_ index_add_ index_copy_ index_fill_ index_put_
index_reduce_ le_ lerp_ lgamma_ log_ log10_ log1p_ log2_ logical_and_ logical_not_ logical_or_ logical_xor_ logit_
lt_ masked_fill_ masked_scatter_ mul_ multiply_ nan_to_num_ ne_ neg_ negative_ normal_ pow_ put_ rad2deg_ random_
reciprocal_ relu_ remainder_ renorm_ round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ sigmoid_ sign_ sin_ sinc_
sinh_ sqrt_ square_ sub_ subtract_ tan_ tanh_ tril_ triu_ true_divide_ trunc_ uniform_ xlogy_ zero_
"""

_TORCH = """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arange
arccos arcsin arctan arctan2 argmax argmin argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d
baddbmm bernoulli bincount bitwise_and bitwise_not bitwise_or bitwise_xor block_diag bmm broadcast_tensors
broadcast_to bucketize cartesian_prod cat cdist ceil chunk clamp clamp_max clamp_min clip clone column_stack
combinations concat concatenate corrcoef cos cosh count_nonzero cov cross cummax cummin cumprod cumsum
cumulative_trapezoid deg2rad det diag diag_embed diagflat diagonal diff digamma dist div divide dot dstack einsum eq
equal erf erfc erfinv exp exp2 expm1 eye flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac
full full_like gather gcd ge greater greater_equal gt heaviside histc hstack hypot index_add index_copy index_fill
index_select inner inverse isclose isfinite isin isinf isnan kron kthvalue layer_norm lcm le lerp less less_equal
lgamma linspace log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not
logical_or logical_xor logit logspace logsumexp lt masked_fill masked_scatter masked_select matmul matrix_exp
matrix_power max maximum mean median meshgrid min minimum mm mode moveaxis movedim msort mul multinomial multiply mv
nan_to_num nanmean nanmedian nanquantile nansum narrow ne neg negative nonzero norm normal not_equal numel ones
ones_like outer permute pinverse polygamma positive pow prod quantile rad2deg rand rand_like randint randint_like
randn randn_like randperm range ravel reciprocal relu remainder renorm repeat_interleave reshape roll rot90 round
rsqrt scatter scatter_add scatter_reduce searchsorted select sigmoid sign signbit sin sinc sinh softmax sort split
sqrt square squeeze stack std std_mean sub subtract sum svd swapaxes swapdims t take take_along_dim tan tanh tensor
tensor_split tensordot tile topk trace transpose trapezoid tril triu true_divide trunc unbind unflatten unique
unique_consecutive unsqueeze vander var var_mean vdot vsplit hsplit dsplit vstack where xlogy zeros zeros_like dropout
cosine_similarity pairwise_distance rms_norm relu_ selu celu prelu rrelu threshold bilinear
"""

_NN = """
adaptive_avg_pool1d avg_pool1d binary_cross_entropy binary_cross_entropy_with_logits celu conv1d cosine_similarity
cross_entropy dropout elu embedding gelu glu group_norm gumbel_softmax hardshrink hardsigmoid hardswish hardtanh
huber_loss interpolate kl_div l1_loss layer_norm leaky_relu linear log_softmax logsigmoid max_pool1d mish mse_loss
nll_loss normalize one_hot pad pairwise_distance prelu relu relu6 rms_norm selu sigmoid silu smooth_l1_loss softmax
softmin softplus softshrink softsign tanh tanhshrink threshold unfold
"""

_LINALG = """
cholesky cond cross det diagonal eig eigh eigvals eigvalsh inv lstsq matmul matrix_exp matrix_norm matrix_power
matrix_rank multi_dot norm pinv qr slogdet solve solve_triangular svd svdvals tensorsolve vander vecdot vector_norm
"""

_SPECIAL = "digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 log1p log_softmax logit logsumexp ndtr ndtri softmax xlogy"

_PY = """
getitem setitem add sub mul truediv floordiv mod pow matmul and or xor lshift rshift neg pos invert abs eq ne lt le gt
ge not iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift
list dict tuple int float str bool append extend insert pop update keys values items len sum min max sorted round size
ndim dtype attr
"""

_EDIT = "project_out_ clamp_ norm_matched_add_ low_rank_ sae_clamp_"

# Methods whose name ends in an underscore, in-place operators, and these change their first argument.
_CONTAINER_WRITES = frozenset("py." + name for name in ["append", "extend", "insert", "pop", "update"])

# These change an argument when a later one says so (`inplace`, `max_norm`), by position too.
_MAY_CHANGE = """
celu dropout elu embedding hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu silu threshold
"""


def names(space: str, words: str) -> frozenset[str]:
    """Operations by what they are called in one of the table's spaces."""
    return frozenset(f"{space}.{word}" for word in words.split())


MAY_CHANGE: frozenset[str] = names("nn", _MAY_CHANGE)

RANDOM: frozenset[str] = (
    names("tensor", "bernoulli multinomial bernoulli_ exponential_ normal_ random_ uniform_")
    | names(
        "torch", "bernoulli dropout multinomial normal rand rand_like randint randint_like randn randn_like randperm"
    )
    | names("torch", "rrelu")
    | names("nn", "dropout gumbel_softmax")
)

OPS: frozenset[str] = (
    names("tensor", _TENSOR)
    | names("torch", _TORCH)
    | names("nn", _NN)
    | names("linalg", _LINALG)
    | names("special", _SPECIAL)
    | names("py", _PY)
    | names("edit", _EDIT)
)


def is_inplace(name: str) -> bool:
    """Whether the operation changes its first argument (a tensor)."""
    space, _, bare = name.partition(".")
    if space == "py":
        return bare == "setitem" or (bare.startswith("i") and bare not in {"int", "invert", "insert", "items"})
    return bare.endswith("_")


def changes_container(name: str) -> bool:
    """Whether the operation changes its first argument if that is a list or dict."""
    return name in _CONTAINER_WRITES or name == "py.setitem"
