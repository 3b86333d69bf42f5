"""Exchanges of attention heads among ranks that divide the tokens: some tokens of all heads for all tokens of some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from ltx_ray.parallel.collectives import Pending, RankGroup


class HeadShape(NamedTuple):
    """Of `parts` tensors of rows (batch * tokens, ranks * groups * width), what one rank has for another."""

    groups: int
    parts: int
    batch: int
    tokens: int
    width: int


@dataclass(frozen=True)
class HeadPlaces:
    """Where a rank writes its rows, by the rank whose heads they are.

    `before`, of lower ranks, and `after`, of higher ones: (ranks, groups, parts, batch, tokens, width). `own`: the same
    without the first axis. The last two axes are dense.
    """

    before: torch.Tensor
    own: torch.Tensor
    after: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.before)

    @property
    def size(self) -> int:
        return len(self.before) + 1 + len(self.after)

    def write(self, part: int, rows: torch.Tensor) -> None:
        """Write the rows (batch * tokens, ranks * groups * width) of a part."""
        groups, _, batch, tokens, width = self.own.shape
        by_rank = rows.view(batch, tokens, self.size, groups, width).permute(2, 3, 0, 1, 4)
        self.before[:, :, part].copy_(by_rank[: self.rank])
        self.own[:, part].copy_(by_rank[self.rank])
        self.after[:, :, part].copy_(by_rank[self.rank + 1 :])


#: Writes every part to its places.
Write = Callable[[HeadPlaces], None]


@runtime_checkable
class HeadTransport(Protocol):
    """A transport that can let a rank write where the others will read."""

    def exchange_heads(self, shape: HeadShape, like: torch.Tensor, write: Write) -> list[Pending[list[torch.Tensor]]]:
        """Do as the function of this name."""


def exchange_heads(
    ranks: RankGroup, shape: HeadShape, like: torch.Tensor, write: Write
) -> list[Pending[list[torch.Tensor]]]:
    """Begin to exchange what `write` writes: of each group, its parts (batch, ranks, tokens, width).

    `ranks`: whose tokens they are. `like`: a tensor of their dtype and device.
    """
    transport: object = ranks.transport
    if isinstance(transport, HeadTransport):
        return transport.exchange_heads(shape, like, write)
    outgoing = like.new_empty((shape.groups, shape.parts, ranks.size, shape.batch, shape.tokens, shape.width))
    by_rank = outgoing.movedim(2, 0)
    write(HeadPlaces(by_rank[: ranks.rank], by_rank[ranks.rank], by_rank[ranks.rank + 1 :]))
    return [ranks.start_all_to_all(list(of_group)).then(_batch_first) for of_group in outgoing]


def _batch_first(received: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.movedim(0, 1) for x in received]
