"""Gated multi-head attention with query and key norms over all heads and split rotary embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.model.rope import RopeTable, rotate
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.parallel.layers import ColumnParallelLinear, RowParallelLinear, ShardedRMSNorm
from ltx_ray.parallel.mesh import SequenceSharding


class Attention(nn.Module):
    """Queries from `x` (B, T, query_dim), keys and values from `context` (B, S, context_dim).

    Heads are divided over the tensor-parallel ranks. The output (B, T, query_dim) is the same on each. Attributes have
    the names of transformer_keys.py. Source: docs/ltx-2.3.md#transformer;
    `ltx_core/model/transformer/attention.py` of the reference v1.2.0.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, eps: float, tp: RankGroup):
        super().__init__()
        inner = heads * head_dim
        #: Heads of this rank.
        self.heads = heads // tp.size
        self.to_q = ColumnParallelLinear(query_dim, inner, tp)
        self.to_k = ColumnParallelLinear(context_dim, inner, tp)
        self.to_v = ColumnParallelLinear(context_dim, inner, tp)
        self.q_norm = ShardedRMSNorm(inner, eps, tp)
        self.k_norm = ShardedRMSNorm(inner, eps, tp)
        self.to_gate_logits = ColumnParallelLinear(query_dim, heads, tp)
        # A list, because the checkpoint names the projection to_out.0.
        self.to_out = nn.ModuleList([RowParallelLinear(inner, query_dim, tp)])

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        q_rope: RopeTable | None = None,
        k_rope: RopeTable | None = None,
        values_only: bool = False,
        x_sharding: SequenceSharding | None = None,
        context_sharding: SequenceSharding | None = None,
    ) -> torch.Tensor:
        """Attend from `x` to `context`, or to `x` itself without one.

        `values_only` passes the values through unattended, the perturbation of STG (arXiv:2411.18664). A sharding says
        that `x` or `context` holds this rank's tokens only; rotary tables are for the tokens that the rank holds.
        """
        context = x if context is None else context
        v = self.to_v(context)
        if values_only:
            heads_out = v.unflatten(-1, (self.heads, -1))
        else:
            q = self._by_head(self.q_norm(self.to_q(x)))
            k = self._by_head(self.k_norm(self.to_k(context)))
            if q_rope is not None:
                q = rotate(q, q_rope)
                k = rotate(k, q_rope if k_rope is None else k_rope)
            heads_out = _attend(q, k, self._by_head(v), x_sharding, context_sharding).transpose(1, 2)
        gates = 2.0 * torch.sigmoid(self.to_gate_logits(x))
        return self.to_out[0]((heads_out * gates.unsqueeze(-1)).flatten(-2))

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_sharding: SequenceSharding | None,
    kv_sharding: SequenceSharding | None,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys; tensors are (B, heads, T, D)."""
    if kv_sharding is None:
        # Every rank has all keys, so its own queries need no other rank.
        return F.scaled_dot_product_attention(q, k, v)
    k, v = kv_sharding.tokens_to_heads(k), kv_sharding.tokens_to_heads(v)
    if q_sharding is None:
        return kv_sharding.gather_heads(F.scaled_dot_product_attention(kv_sharding.own_heads(q), k, v))
    return q_sharding.heads_to_tokens(F.scaled_dot_product_attention(q_sharding.tokens_to_heads(q), k, v))
