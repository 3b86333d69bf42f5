"""Attention over tokens that the ranks of a gang divide (mesh.SequenceSharding), on rows of the fused path.

Heads are exchanged in groups, so that the attention of one group hides the exchanges of another.
"""

from __future__ import annotations

import torch

from ltx_ray.model.attention_backends import Attend
from ltx_ray.parallel.collectives import Pending
from ltx_ray.parallel.mesh import SequenceSharding

#: Groups of heads, of which the most are taken whose attention fills a GPU: so many queries, counted for each head.
_GROUPS, _FILLING_QUERIES = (4, 2), 32_000


def attend_to_divided(
    tokens: SequenceSharding,
    q: torch.Tensor,
    k: torch.Tensor,
    values: Pending[tuple[torch.Tensor, ...]],
    heads: int,
    batch: int,
    attend: Attend,
) -> torch.Tensor:
    """Attention of q (R, heads * D) to k (R, heads * D), both of this rank's tokens: (R, heads, D).

    `values` (B, T, heads / n, D) are those of all tokens, as `start_rows_to_heads` exchanges them.
    """
    n = tokens.group.size
    groups = head_groups(heads // n, tokens.length)
    started = [tokens.start_rows_to_heads([q, k], batch, heads, group, groups) for group in range(groups)]
    (v,) = values.wait()
    returned = []
    for group, exchange in enumerate(started):
        own_q, own_k = exchange.wait()
        own_v = v.unflatten(2, (groups, -1))[:, :, group]
        returned.append(tokens.start_heads_to_rows(attend(own_q, own_k, own_v)))
    rows = q.new_empty((len(q), n, groups, heads // n // groups, q.shape[1] // heads))
    for group, back in enumerate(returned):
        rows[:, :, group] = back.wait()
    return rows.flatten(1, 3)


def head_groups(heads: int, length: int) -> int:
    """In how many groups a rank's heads are exchanged, for attention among `length` tokens."""
    fitting = (n for n in _GROUPS if heads % n == 0 and heads // n * length >= _FILLING_QUERIES)
    return next(fitting, 1)
