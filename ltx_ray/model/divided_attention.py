"""Attention over tokens that the ranks of a gang divide (mesh.SequenceSharding), on rows of the fused path.

Heads are exchanged in groups, so that the attention of one group hides the exchanges of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ltx_ray.model.attention_backends import Attend
from ltx_ray.parallel.collectives import Pending
from ltx_ray.parallel.mesh import SequenceSharding

#: Groups of heads, of which the most are taken whose attention fills a GPU: so many queries, counted for each head.
_GROUPS, _FILLING_QUERIES = (4, 2), 32_000


@dataclass
class HeadExchange:
    """An exchange of queries, keys and values whose tokens are divided, in groups of heads.

    `unnormed`: rows (R, heads * D) that go with those that are normed. `pending`: by group, once it has begun.
    """

    tokens: SequenceSharding
    batch: int
    groups: int
    unnormed: list[torch.Tensor]
    pending: list[Pending[tuple[torch.Tensor, ...]]] = field(default_factory=list)


def attend_to_divided(
    tokens: SequenceSharding,
    queries_and_keys: Sequence[Pending[tuple[torch.Tensor, ...]]],
    values: Pending[tuple[torch.Tensor, ...]],
    heads: int,
    attend: Attend,
) -> torch.Tensor:
    """Attention of all tokens, for the rows of this rank's: (R, n, groups, heads / n / groups, D).

    The queries and keys of each group, and the values of all, are those that `start_rows_to_heads` exchanges.
    """
    n, groups = tokens.group.size, len(queries_and_keys)
    (v,) = values.wait()
    batch, _, _, head_dim = v.shape
    rows = v.new_empty((groups, n, batch * tokens.shard_length, heads // n // groups, head_dim))
    returned = []
    for group, exchange in enumerate(queries_and_keys):
        q, k = exchange.wait()
        own_v = v.unflatten(2, (groups, -1))[:, :, group]
        returned.append(tokens.start_heads_to_rows(attend(q, k, own_v), rows[group]))
    for back in returned:
        back.wait()
    return rows.permute(2, 1, 0, 3, 4)


def head_groups(heads: int, length: int) -> int:
    """In how many groups a rank's heads are exchanged, for attention among `length` tokens."""
    fitting = (n for n in _GROUPS if heads % n == 0 and heads // n * length >= _FILLING_QUERIES)
    return next(fitting, 1)
