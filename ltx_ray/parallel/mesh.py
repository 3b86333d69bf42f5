"""How the ranks of a gang divide the work: by weights (tensor parallel), by tokens or by guidance passes.

A gang of tp x n ranks consists of n tensor-parallel groups, each of which holds all weights. Rank r is rank r % tp of
its tensor-parallel group and rank r // tp among its peers, which hold the same shard. Peers divide either the tokens of
a call or its guidance passes.

Tokens are divided as in DeepSpeed Ulysses (arXiv:2309.14509): an all-to-all turns some tokens of all heads into all
tokens of some heads before attention, and back after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ltx_ray.parallel.layers import SINGLE_RANK, RankGroup


@dataclass(frozen=True)
class Mesh:
    """The two groups of a rank: `tp` shares each weight, and `peers` hold the same shard as this rank."""

    tp: RankGroup = SINGLE_RANK
    peers: RankGroup = SINGLE_RANK


def make_mesh(rank: int, world: int, tp: int) -> Mesh:
    """The groups of `rank`. All ranks of the gang call this together; `tp` divides `world`."""
    assert world % tp == 0, (world, tp)
    peers = world // tp
    if peers == 1:
        return Mesh(RankGroup(rank, world))
    if tp == 1:
        return Mesh(SINGLE_RANK, RankGroup(rank, world))
    # torch.distributed requires every rank to create every group, including those of others.
    tp_groups = [dist.new_group(list(range(start, start + tp))) for start in range(0, world, tp)]
    peer_groups = [dist.new_group(list(range(tp_rank, world, tp))) for tp_rank in range(tp)]
    return Mesh(
        RankGroup(rank % tp, tp, tp_groups[rank // tp]),
        RankGroup(rank // tp, peers, peer_groups[rank % tp]),
    )


@dataclass(frozen=True)
class SequenceSharding:
    """A sequence of `length` tokens divided over the n ranks of `group`.

    Shards are equally long. Those at the end are padded with zeros, which never reach attention: every method that
    puts shards together cuts the result to `length`.
    """

    group: RankGroup
    length: int

    @property
    def shard_length(self) -> int:
        """Tokens of a rank, padding included."""
        return -(-self.length // self.group.size)

    def own_shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of `x`, which holds all of them along `dim`."""
        start = min(self.group.rank * self.shard_length, self.length)
        shard = x.narrow(dim, start, min(self.shard_length, self.length - start))
        return _padded(shard, dim, self.shard_length)

    def gather_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T / n, C) of each rank -> all tokens (B, T, C) on every rank."""
        shards = [torch.empty_like(x) for _ in range(self.group.size)]
        dist.all_gather(shards, x.contiguous(), group=self.group.group)
        return torch.cat(shards, dim=1)[:, : self.length]

    def tokens_to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T / n, D) -> (B, heads / n, T, D): some tokens of all heads become all tokens of some heads."""
        batch, heads, shard_length, dim = x.shape
        n = self.group.size
        assert heads % n == 0, (heads, n)
        sent = x.unflatten(1, (n, heads // n)).movedim(1, 0).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group.group)
        # The first axis of `received` is the rank whose tokens they are.
        by_head = received.permute(1, 2, 0, 3, 4).reshape(batch, heads // n, n * shard_length, dim)
        return by_head[:, :, : self.length]

    def heads_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads / n, T, D) -> (B, heads, T / n, D), the inverse of tokens_to_heads."""
        batch, heads, _, dim = x.shape
        n = self.group.size
        padded = _padded(x, 2, n * self.shard_length)
        sent = padded.unflatten(2, (n, self.shard_length)).movedim(2, 0).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group.group)
        return received.movedim(0, 1).reshape(batch, n * heads, self.shard_length, dim)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T, D), the same on every rank -> this rank's (B, heads / n, T, D)."""
        return x[:, self.group.slice(x.shape[1])]

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads / n, T, D) of each rank -> (B, heads, T, D) on every rank."""
        shards = [torch.empty_like(x) for _ in range(self.group.size)]
        dist.all_gather(shards, x.contiguous(), group=self.group.group)
        return torch.cat(shards, dim=1)


def _padded(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim=dim)
