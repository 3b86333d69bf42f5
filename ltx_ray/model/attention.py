"""Gated multi-head attention with q/k norm over all heads and split rotary embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ltx_ray.model.rope import RopeTable, rotate
from ltx_ray.parallel.layers import ColumnLinear, HeadsRMSNorm, RowLinear, TPGroup
from ltx_ray.parallel.mesh import Tokens


class Attention(nn.Module):
    """Queries from `x` (B, T, query_dim), keys and values from `context` (B, S, context_dim).

    Heads are divided over the tensor-parallel ranks; the output (B, T, query_dim) is whole on each. Source:
    `attention.py` of the reference v1.2.0.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, eps: float, tp: TPGroup):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads // tp.size
        self.to_q = ColumnLinear(query_dim, inner, tp)
        self.to_k = ColumnLinear(context_dim, inner, tp)
        self.to_v = ColumnLinear(context_dim, inner, tp)
        self.q_norm = HeadsRMSNorm(inner, eps, tp)
        self.k_norm = HeadsRMSNorm(inner, eps, tp)
        self.to_gate_logits = ColumnLinear(query_dim, heads, tp)
        # a list because the checkpoint calls the projection to_out.0
        self.to_out = nn.ModuleList([RowLinear(inner, query_dim, tp)])

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        q_rope: RopeTable | None = None,
        k_rope: RopeTable | None = None,
        values_only: bool = False,
        x_tokens: Tokens | None = None,
        context_tokens: Tokens | None = None,
    ) -> torch.Tensor:
        """`values_only` passes the values through unattended (the perturbation of STG).

        `x_tokens` and `context_tokens` say of which whole `x` and `context` are this rank's tokens; rotary
        tables are for what the rank has.
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
            heads_out = _attend(q, k, self._by_head(v), x_tokens, context_tokens).transpose(1, 2)
        gates = 2.0 * torch.sigmoid(self.to_gate_logits(x))
        return self.to_out[0]((heads_out * gates.unsqueeze(-1)).flatten(-2))

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_tokens: Tokens | None, kv_tokens: Tokens | None
) -> torch.Tensor:
    """Attention over all keys for this rank's queries, each (B, heads, T, D)."""
    if kv_tokens is None:
        # every rank has all keys, so its own queries need no one
        return F.scaled_dot_product_attention(q, k, v)
    k, v = kv_tokens.to_heads(k), kv_tokens.to_heads(v)
    if q_tokens is None:
        return kv_tokens.all_heads(F.scaled_dot_product_attention(kv_tokens.own_heads(q), k, v))
    return q_tokens.to_tokens(F.scaled_dot_product_attention(q_tokens.to_heads(q), k, v))
