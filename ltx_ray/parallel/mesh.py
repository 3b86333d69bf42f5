"""How the ranks of a gang share the work: by weights (tensor parallel), by tokens or by guidance passes.

Rank r of a gang of tp x width is rank r % tp of its tensor-parallel group, and place r // tp among the
ranks that hold the same shard. Those `width` ranks split either the tokens of a call (Ulysses: attention
changes hands from tokens to heads and back) or its guidance passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ltx_ray.parallel.layers import TPGroup


@dataclass(frozen=True)
class Mesh:
    """`tp`: the ranks that share each weight; `wide`: those that hold the same shard as this one."""

    tp: TPGroup = TPGroup()  # noqa: RUF009 (frozen)
    wide: TPGroup = TPGroup()  # noqa: RUF009 (frozen)


def make_mesh(rank: int, world: int, tp: int) -> Mesh:
    """The groups of `rank`. Every rank of the gang calls this at the same time; `tp` divides `world`."""
    assert world % tp == 0, (world, tp)
    width = world // tp
    if width == 1:
        return Mesh(TPGroup(rank, world))
    if tp == 1:
        return Mesh(TPGroup(), TPGroup(rank, world))
    # all ranks make all groups, also those that they are not in
    weights = [dist.new_group(list(range(start, start + tp))) for start in range(0, world, tp)]
    same = [dist.new_group(list(range(place, world, tp))) for place in range(tp)]
    return Mesh(TPGroup(rank % tp, tp, weights[rank // tp]), TPGroup(rank // tp, width, same[rank % tp]))


@dataclass(frozen=True)
class Tokens:
    """A sequence of `length` tokens over the ranks of `group`, each with an equal part, the last ones padded."""

    group: TPGroup
    length: int

    @property
    def part(self) -> int:
        return -(-self.length // self.group.size)

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of `x`, which has all of them along `dim`."""
        start = min(self.group.rank * self.part, self.length)
        piece = x.narrow(dim, start, min(self.part, self.length - start))
        return _padded(piece, dim, self.part)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens (B, T, C) from every rank's own (B, T / n, C)."""
        parts = [torch.empty_like(x) for _ in range(self.group.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group.group)
        return torch.cat(parts, dim=1)[:, : self.length]

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T / n, D) -> (B, heads / n, T, D): from some tokens of all heads to all tokens of some."""
        batch, heads, part, dim = x.shape
        n = self.group.size
        assert heads % n == 0, (heads, n)
        sent = x.unflatten(1, (n, heads // n)).movedim(1, 0).contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group.group)
        # what came from rank r are its tokens
        return got.permute(1, 2, 0, 3, 4).reshape(batch, heads // n, n * part, dim)[:, :, : self.length]

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads / n, T, D) -> (B, heads, T / n, D), the way back."""
        batch, heads, _, dim = x.shape
        n = self.group.size
        sent = _padded(x, 2, n * self.part).unflatten(2, (n, self.part)).movedim(2, 0).contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group.group)
        return got.movedim(0, 1).reshape(batch, n * heads, self.part, dim)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T, D) -> this rank's (B, heads / n, T, D) of a tensor that every rank has."""
        return x[:, self.group.slice(x.shape[1])]

    def all_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads / n, T, D) -> (B, heads, T, D), the same on every rank."""
        parts = [torch.empty_like(x) for _ in range(self.group.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group.group)
        return torch.cat(parts, dim=1)


def _padded(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim=dim)
