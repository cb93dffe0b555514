"""Edits of rows by table: the specification, in plain torch, and what runs on a CPU.

Every function changes `rows` [N, H] in place: row i by line `slots[i]` of the columns, and a row whose slot is negative
keeps its bits. Rows and columns of vectors are bfloat16, float16 or float32, each its own; columns of numbers are float32.
A slot must be below the number of lines.

The rounding rule
-----------------
*Elementwise* operations (add, scale, replace, ablate) give the bits of the torch expression that a user writes with a Python
number `c`, in place or not:

- `c * v` is multiplied in float32 and rounded once, to the dtype of v (so not at all in float32);
- `h + x` is added in float32 and rounded once, to the dtype of h; likewise `c * h`;
- never a fused multiply-add: `h.add_(v, alpha=c)` skips the rounding of `c * v` and is another operation.

`h -= c * v` is an add with `-c`, bit for bit. `h / c` isn't a scale by `1 / c`.

*Operations with dot products* (the others) take rows and columns as stored, compute everything in float32 and round once, at
the end, to the dtype of h. A user's bfloat16 expression rounds after each operation, so it differs from these by its own
roundings. The order of the sums isn't specified: two implementations agree to within `eps(dtype of h) * |h'| + 1e-6 * s`,
where s is the row's largest |h| plus its largest |change|, the latter with every term of the formula's sums taken absolutely.

What torch's expression makes of undefined values is kept: a zero direction or a vanished norm gives NaN, not an unedited row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add(rows: Tensor, slots: Tensor, *, vectors: Tensor, coefficients: Tensor) -> None:
    """`h += c * v`. `vectors` [S, H], `coefficients` [S]."""
    edited, lines = _edited(slots)
    _put(rows, edited, rows[edited] + product(lines, vectors=vectors, coefficients=coefficients))


def product(lines: Tensor, *, vectors: Tensor, coefficients: Tensor) -> Tensor:
    """What lines add: `c * v`, [N, H]. `lines`: int64 [N]."""
    vector = vectors[lines]
    return (vector.float() * coefficients[lines, None]).to(vector.dtype)


def scale(rows: Tensor, slots: Tensor, *, coefficients: Tensor) -> None:
    """`h *= c`. `coefficients` [S]."""
    edited, lines = _edited(slots)
    _put(rows, edited, rows[edited].float() * coefficients[lines, None])


def replace(rows: Tensor, slots: Tensor, *, vectors: Tensor) -> None:
    """`h = v`. `vectors` [S, H]."""
    edited, lines = _edited(slots)
    _put(rows, edited, vectors[lines])


def ablate(rows: Tensor, slots: Tensor) -> None:
    """`h = 0`. No columns: any slot that isn't negative ablates its row."""
    edited, _ = _edited(slots)
    rows.index_fill_(0, edited, 0)


def project_out(rows: Tensor, slots: Tensor, *, directions: Tensor, coefficients: Tensor) -> None:
    """`h -= c * (h·d) / (d·d) * d`: with c = 1 nothing is left along d. `directions` [S, H], `coefficients` [S].

    Arditi et al., Refusal in Language Models Is Mediated by a Single Direction, 2024, for a unit d.
    """
    edited, lines = _edited(slots)
    h, d = rows[edited].float(), directions[lines].float()
    amount = coefficients[lines] * (_dot(h, d) / _dot(d, d))
    _put(rows, edited, h - amount[:, None] * d)


def clamp(rows: Tensor, slots: Tensor, *, directions: Tensor, lows: Tensor, highs: Tensor) -> None:
    """`h += (min(max(p, low), high) - p) * u`, where `u = d / |d|` and `p = h·u`. A row whose p is inside keeps its bits.

    `directions` [S, H], not necessarily unit; `lows`, `highs` [S] in units of h along u, infinite where there is no bound.
    """
    edited, lines = _edited(slots)
    h, d = rows[edited].float(), directions[lines].float()
    length = _dot(d, d).sqrt()
    component = _dot(h, d) / length
    bounded = torch.minimum(torch.maximum(component, lows[lines]), highs[lines])
    change = ((bounded - component) / length)[:, None] * d
    moved = bounded != component  # NaN is
    _put(rows, edited[moved], (h + change)[moved])


def norm_matched_add(rows: Tensor, slots: Tensor, *, vectors: Tensor, coefficients: Tensor) -> None:
    """`w = h + c * v; h = w * (|h| / |w|)`: turns the row and keeps its length. `vectors` [S, H], `coefficients` [S]."""
    edited, lines = _edited(slots)
    h = rows[edited].float()
    moved = h + coefficients[lines, None] * vectors[lines].float()
    factor = _dot(h, h).sqrt() / _dot(moved, moved).sqrt()
    _put(rows, edited, moved * factor[:, None])


def low_rank(rows: Tensor, slots: Tensor, *, downs: Tensor, ups: Tensor, coefficients: Tensor) -> None:
    """`h += c * B (A h)`. A: `downs` [S, r, H]; B: `ups` [S, H, r]; `coefficients` [S].

    Hu et al., LoRA, 2021, on a site's value in place of a weight. One rank at a time: no tensor is larger than the rows.
    """
    edited, lines = _edited(slots)
    h = rows[edited].float()
    change = torch.zeros_like(h)
    for rank in range(downs.shape[1]):
        inner = _dot(h, downs[lines, rank].float())
        change += inner[:, None] * ups[lines, :, rank].float()
    _put(rows, edited, h + coefficients[lines, None] * change)


def sae_clamp(
    rows: Tensor, slots: Tensor, *, encoders: Tensor, biases: Tensor, decoders: Tensor, targets: Tensor
) -> None:
    """`a = relu(e·h + b); h += (target - a) * d`: sets one feature of a sparse autoencoder. A row with a = target keeps its bits.

    `encoders`, `decoders` [S, H], `biases`, `targets` [S]. An encoder that subtracts the decoder's bias first has it folded
    into b. Templeton et al., Scaling Monosemanticity, 2024: what the autoencoder doesn't explain of h stays.
    """
    edited, lines = _edited(slots)
    h = rows[edited].float()
    activation = (_dot(encoders[lines].float(), h) + biases[lines]).relu()
    missing = targets[lines] - activation
    moved = missing != 0
    _put(rows, edited[moved], (h + missing[:, None] * decoders[lines].float())[moved])


def _edited(slots: Tensor) -> tuple[Tensor, Tensor]:
    """The indexes of the edited rows, and for each the line of the table."""
    edited = (slots >= 0).nonzero()[:, 0]
    return edited, slots[edited].long()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row: [N, H] float32 twice -> [N]."""
    return (left * right).sum(-1)


def _put(rows: Tensor, edited: Tensor, values: Tensor) -> None:
    rows.index_copy_(0, edited, values.to(rows.dtype))
