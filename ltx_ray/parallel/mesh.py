"""How the ranks of a gang divide the work: by weights (tensor parallel), by tokens or by guidance passes.

A gang of tp x n ranks consists of n tensor-parallel groups, each of which holds all weights. Rank r is rank r % tp of
its tensor-parallel group and rank r // tp among its peers, which hold the same shard. Peers divide either the tokens of
a call or its guidance passes.

Tokens are divided as in DeepSpeed Ulysses (arXiv:2309.14509): an all-to-all turns some tokens of all heads into all
tokens of some heads before attention, and back after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ltx_ray.parallel.collectives import SINGLE_RANK, Pending, ProcessGroup, RankGroup
from ltx_ray.parallel.head_exchange import HeadShape, Write, exchange_heads
from ltx_ray.parallel.peer_copies import fastest_transport


@dataclass(frozen=True)
class Mesh:
    """The groups of a rank: `tp` shares each weight, and `peers` hold the same shard as this rank.

    In stage 1 the peers are divided once more: `passes` share the guidance passes, `tokens` those of each pass.
    """

    tp: RankGroup = SINGLE_RANK
    peers: RankGroup = SINGLE_RANK
    passes: RankGroup = SINGLE_RANK
    tokens: RankGroup = SINGLE_RANK


def make_mesh(rank: int, world: int, tp: int, passes: int = 1, tokens: int = 1) -> Mesh:
    """The groups of `rank`. All ranks of the gang call this together; `tp` divides `world`.

    In stage 1, `passes` groups of `tokens` peers share the guidance passes. Where both are 1, all peers repeat it.
    """
    assert world % tp == 0 and passes * tokens in (1, world // tp), (world, tp, passes, tokens)
    strides = {"tp": (tp, 1), "peers": (world // tp, tp), "passes": (passes, tp * tokens), "tokens": (tokens, tp)}
    made: dict[tuple[int, int], RankGroup] = {}
    for size, stride in strides.values():
        if (size, stride) not in made:
            made[size, stride] = _group(rank, world, size, stride)
    return Mesh(**{name: made[of] for name, of in strides.items()})


def _group(rank: int, world: int, size: int, stride: int) -> RankGroup:
    """The group of `rank` among those of `size` ranks, each `stride` from the next."""
    if size == 1:
        return SINGLE_RANK
    if size == world:
        return _fast(RankGroup.of_processes(rank, world))
    own = RankGroup()
    for first in (r for r in range(world) if r // stride % size == 0):
        ranks = list(range(first, first + size * stride, stride))
        # torch.distributed requires every rank to create every group, including those of others.
        group = dist.new_group(ranks)
        if rank in ranks:
            own = RankGroup.of_processes(ranks.index(rank), size, group)
    return _fast(own)


def _fast(group: RankGroup) -> RankGroup:
    assert isinstance(group.transport, ProcessGroup), group
    return replace(group, transport=fastest_transport(group.rank, group.size, group.transport))


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
        return self._gather(x)[:, : self.length]

    def tokens_to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T / n, D) -> (B, heads / n, T, D): some tokens of all heads become all tokens of some heads."""
        batch, heads, shard_length, dim = x.shape
        n = self.group.size
        assert heads % n == 0, (heads, n)
        received = self.group.all_to_all(x.unflatten(1, (n, heads // n)).movedim(1, 0))
        # The first axis of `received` is the rank whose tokens they are.
        by_head = received.permute(1, 2, 0, 3, 4).reshape(batch, heads // n, n * shard_length, dim)
        return by_head[:, :, : self.length]

    def heads_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads / n, T, D) -> (B, heads, T / n, D), the inverse of tokens_to_heads."""
        batch, heads, _, dim = x.shape
        n = self.group.size
        padded = _padded(x, 2, n * self.shard_length)
        received = self.group.all_to_all(padded.unflatten(2, (n, self.shard_length)).movedim(2, 0))
        return received.movedim(0, 1).reshape(batch, n * heads, self.shard_length, dim)

    def start_rows_to_heads(
        self, parts: Sequence[torch.Tensor], batch: int, heads: int, write: Write, groups: int = 1
    ) -> list[Pending[tuple[torch.Tensor, ...]]]:
        """Each (B * T / n, heads * D) of this rank's tokens -> (B, T, heads / n / groups, D) of all tokens.

        `write` writes what is to be exchanged of the parts. Every rank's heads are exchanged in `groups`.
        """
        n = self.group.size
        assert heads % (n * groups) == 0, (heads, n, groups)

        def by_head(received: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            tokens = (x.flatten(1, 2)[:, : self.length] for x in received)
            return tuple(x.unflatten(2, (heads // n // groups, -1)) for x in tokens)

        shape = HeadShape(groups, len(parts), batch, self.shard_length, parts[0].shape[1] // (n * groups))
        return [pending.then(by_head) for pending in exchange_heads(self.group, shape, parts[0], write)]

    def start_heads_to_rows(self, x: torch.Tensor, into: torch.Tensor) -> Pending[list[torch.Tensor]]:
        """(B, T, H, D) of all tokens, H heads -> `into` (n, B * T / n, H, D): this rank's tokens, each rank's heads."""
        n, length = self.group.size, self.shard_length
        by_rank = _padded(x, 1, n * length).unflatten(1, (n, length)).movedim(1, 0)
        return self.group.start_all_to_all([by_rank], [into.unflatten(1, (len(x), length))])

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T, D), the same on every rank -> this rank's (B, heads / n, T, D)."""
        return x[:, self.group.slice(x.shape[1])]

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads / n, T, D) of each rank -> (B, heads, T, D) on every rank."""
        return self._gather(x)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) of each rank -> (B, n * L, ...)."""
        by_rank = self.group.gather(x[None])
        return torch.cat(by_rank.unbind(0), dim=1)


@dataclass(frozen=True)
class RowSharding:
    """`length` rows of activations divided over the n tensor-parallel ranks of `group`, between sharded layers.

    Every rank norms and modulates its own rows (arXiv:2205.05198, section 4.2.2): the partial products of a
    row-parallel layer are summed by a reduce-scatter, and the input of a column-parallel layer is gathered. Rows are
    exchanged in `pieces`, so that a layer works on one piece while the next is on its way. Of each piece a rank has one
    n-th. What pads the last piece reaches no other row.
    """

    group: RankGroup
    length: int
    pieces: int = 1

    @property
    def piece_length(self) -> int:
        """Rows of a rank in a piece, padding included."""
        return -(-self.length // (self.group.size * self.pieces))

    @property
    def shard_length(self) -> int:
        """Rows of a rank, padding included."""
        return self.pieces * self.piece_length

    def rows_of(self, piece: int) -> slice:
        """The rows of a piece, without padding."""
        length = self.group.size * self.piece_length
        return slice(piece * length, min((piece + 1) * length, self.length))

    def own_rows_of(self, piece: int) -> slice:
        """The rows of a piece within this rank's shard."""
        return slice(piece * self.piece_length, (piece + 1) * self.piece_length)

    def own_shard(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of `x` (length, ...)."""
        if self.group.size == 1:
            return x
        padded = _padded(x, 0, self.group.size * self.shard_length)
        return padded.unflatten(0, (self.pieces, self.group.size, -1))[:, self.group.rank].flatten(0, 1)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """(shard_length, ...) of each rank -> (length, ...)."""
        if self.group.size == 1:
            return shard
        by_rank = self.group.gather(shard).unflatten(0, (self.group.size, self.pieces, -1))
        return by_rank.transpose(0, 1).flatten(0, 2)[: self.length]

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of a piece, and as many rows of zeros as make it divisible."""
        return _padded(rows, 0, self.group.size * self.piece_length)


def _padded(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim=dim)
