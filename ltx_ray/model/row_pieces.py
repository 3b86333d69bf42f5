"""Rows of activations in pieces, which tensor-parallel ranks exchange one after the other (mesh.RowSharding)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ltx_ray.model import steps
from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.steps import Activations, QuantizedRows
from ltx_ray.parallel.collectives import Pending
from ltx_ray.parallel.fp8 import FP8
from ltx_ray.parallel.mesh import RowSharding


@dataclass(frozen=True)
class PendingRows:
    """The input of a layer: all B * T rows, in pieces that may be on their way."""

    pieces: list[Pending[Activations]]
    rows: RowSharding

    def through(self, layer: PackedLinear) -> torch.Tensor:
        """All rows through a layer: (B * T, N)."""
        if len(self.pieces) == 1:
            return steps.linear(self.pieces[0].wait(), layer)
        out = layer.bias.new_empty((self.rows.length, len(layer.bias)))
        for number, piece in enumerate(self.pieces):
            steps.linear(piece.wait(), layer, out=out[self.rows.rows_of(number)])
        return out


def exchanged_together(streams: Sequence[RowSharding]) -> list[list[tuple[int, int]]]:
    """The (number of a stream, piece) of each exchange, in order. A stream of fewer pieces goes with the last ones."""
    most = max((rows.pieces for rows in streams), default=0)
    behind = [most - rows.pieces for rows in streams]
    return [[(n, step - late) for n, late in enumerate(behind) if step >= late] for step in range(most)]


def piece_of(x: Activations, rows: RowSharding, piece: int) -> Activations:
    """A piece of all rows."""
    return x if rows.pieces == 1 else steps.some_rows(x, rows.rows_of(piece))


def without_padding(rows: RowSharding, piece: int, x: Activations) -> Activations:
    """What has been gathered of a piece, without its padding."""
    if rows.group.size == 1:
        return x
    of_piece = rows.rows_of(piece)
    return steps.some_rows(x, slice(of_piece.stop - of_piece.start))


def exchanged_tensors(x: Activations) -> tuple[torch.Tensor, ...]:
    """What ranks exchange of rows. Not every transport knows e4m3."""
    return (x,) if isinstance(x, torch.Tensor) else (x.values.view(torch.uint8), x.scale)


def as_activations(first: int, quantized: bool, tensors: list[torch.Tensor]) -> Activations:
    """What `exchanged_tensors` made `tensors` of, beginning with number `first`."""
    return QuantizedRows(tensors[first].view(FP8), tensors[first + 1]) if quantized else tensors[first]
