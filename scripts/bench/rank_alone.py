"""One rank of a gang without the others, on one GPU: what it computes itself, and what it would exchange.

The rank's exchanges have the right shapes and no transport (`collectives.Alone`). Its time is held against the skeleton
of its own shard: the products and attention that are its part. The speed-up of a whole gang is a prediction from the
bytes that are counted and the rates of exchanges that were measured on two H200s with NVLink (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_ray.parallel.collectives import Alone

#: Milliseconds of an exchange: to begin it, and for each MiB that a rank sends, laying it out included. Fits to copies
#: of 16 to 128 MiB between two H200s with a barrier before each (0.063 to 0.378 ms).
_BEGIN, _PER_MIB = 0.018, 0.0034
_MIB = 2**20


@dataclass(frozen=True)
class OneRank:
    """Milliseconds of a rank's pass and of its skeleton, and its exchanges by name: their number, and bytes sent."""

    ours: float
    skeleton: float
    calls: dict[str, int]
    nbytes: dict[str, int]


@dataclass(frozen=True)
class RankAlone:
    """Milliseconds of a pass: of one card, and of its skeleton; of a rank of `ranks`, and of its shard's skeleton.

    In stage 2 the rank's pass may be a graph where one card launches its kernels, as in a run.
    """

    ranks: int
    whole: float
    whole_skeleton: float
    rank: float
    rank_skeleton: float
    calls: dict[str, int]
    nbytes: dict[str, int]
    layers: int
    #: Exchanges of a block that continue another one.
    pieces: int

    @property
    def exchanges(self) -> float:
        """Estimated milliseconds of a pass's exchanges when nothing hides them."""
        return sum(self.calls.values()) * _BEGIN + sum(self.nbytes.values()) / _MIB * _PER_MIB

    @property
    def figures(self) -> dict[str, float]:
        """The figures of a case, by the end of its key."""
        launched = sum(self.calls.values()) / self.layers
        return {
            "ms": self.rank,
            "x_skeleton": self.rank / self.rank_skeleton,
            "skeletons_over_one_card": self.ranks * self.rank_skeleton / self.whole_skeleton,
            "collectives_per_block": round(launched - self.pieces, 2),
            "launches_per_block": round(launched, 2),
            "bytes_per_pass": float(sum(self.nbytes.values())),
            "exchanges_ms": self.exchanges,
            "speedup_hidden": self.whole / max(self.rank, self.exchanges),
            "speedup_exposed": self.whole / (self.rank + self.exchanges),
        }

    def table(self, name: str) -> str:
        f, mib = self.figures, sum(self.nbytes.values()) / _MIB
        exchanges = ", ".join(f"{n} {kind.replace('_', '-')}" for kind, n in sorted(self.calls.items()))
        return "\n".join(
            (
                f"{name}: one of {self.ranks} ranks takes {self.rank:.2f} ms,",
                f"  {f['x_skeleton']:.3f} of the products and attention of its shard ({self.rank_skeleton:.2f} ms),",
                f"  of which {self.ranks} take {f['skeletons_over_one_card']:.3f} of those of one card "
                f"({self.whole_skeleton:.2f} ms)",
                f"  {f['collectives_per_block']:g} exchanges a block, in {f['launches_per_block']:g} pieces "
                f"({exchanges} a pass)",
                f"  {mib:,.0f} MiB sent a pass, about {self.exchanges:.1f} ms",
                f"  predicted speed-up over one card ({self.whole:.2f} ms): {f['speedup_hidden']:.2f} when all of this "
                f"is hidden, {f['speedup_exposed']:.2f} when nothing is",
            )
        )


def counted(transport: Alone) -> tuple[dict[str, int], dict[str, int]]:
    """The exchanges since the last call, and their bytes."""
    found = dict(transport.calls), dict(transport.nbytes)
    transport.calls.clear()
    transport.nbytes.clear()
    return found
