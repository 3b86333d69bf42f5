"""Where replicas of text and of decode run, how many there may be, and what each reserves. No Ray, no torch.

A call of decode takes the GPU for a third of its time. The rest is x264 and the upload, so CPUs bound how many replicas
a node has. How many a run needs follows from the seconds of its calls: `driver/pool_sizer.py` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ltx_ray.config import ENCODER_THREADS, EngineSpec, PoolSpec
from ltx_ray.stages import DIFFUSION_STAGES, OUTPUT_STAGES, TRAITS, Stage

#: Replicas over those that would be busy all the time.
HEADROOM = 1.3
#: GPUs of the DiT whose clips take all of a GPU in text and decode: (0.1 + 1.75) s of 63 s per clip, with margin.
_DIT_GPUS_PER_OUTPUT_GPU = 31
#: Replicas of text for each rank that they may run beside, at most.
_MOST_TEXT = 1 / 8
#: Calls that a replica of decode takes at once on a GPU: one is encoded and uploaded while the GPU decodes the next.
CALLS_AT_ONCE = 2


@dataclass(frozen=True)
class Node:
    """Slots of a node that a run may use."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class _Parts:
    """How text and decode divide a GPU that has no rank of the DiT: parts of it, and those of a replica of each."""

    all: int
    text: int
    decode: int = 1


#: With 64 GiB a GPU holds five decoders, or three beside the text model. A smaller one holds one of each.
_ROOMY, _NARROW = _Parts(5, 2), _Parts(2, 1)


class Colocation(Enum):
    """Which GPUs the single-rank replicas run on, those of text and of decode."""

    #: On GPUs without a rank of the DiT.
    NONE = "none"
    #: Beside ranks of the DiT, both beside the same one where it has to be.
    BOTH = "both"
    #: Beside ranks of the DiT, each beside another one.
    SEPARATE = "separate"


@dataclass(frozen=True)
class OutputPools:
    """Replicas of text and of decode: how many a run begins with, and what each reserves."""

    text: int = 1
    decode: int = 1
    #: The most that the driver may have of each; None where the number is fixed.
    most_text: int | None = None
    most_decode: int | None = None
    #: Parts of a GPU of a rank of the DiT, of a replica of text and of one of decode.
    rank_gpus: float = 0.0
    text_gpus: float = 0.0
    decode_gpus: float = 0.0
    decode_cpus: int = 1

    @property
    def _own_cards(self) -> bool:
        return self.rank_gpus == 1.0

    def text_pool(self, engine: EngineSpec) -> PoolSpec:
        return PoolSpec(
            "text", (Stage.TEXT,), self.text, 1, engine, 1.0, self.text_gpus, self.most_text,
            fills_cards=self._own_cards,
        )  # fmt: skip

    def decode_pool(self, engine: EngineSpec) -> PoolSpec:
        cpus, gpus, calls = self.decode_cpus, self.decode_gpus, CALLS_AT_ONCE if self.decode_gpus else 1
        return PoolSpec(
            "decode", OUTPUT_STAGES, self.decode, 1, engine, cpus, gpus, self.most_decode, calls,
            fills_cards=self._own_cards,
        )  # fmt: skip


def needed(stage: Stage, dit_gpus: float, with_stage2: bool, headroom: float = HEADROOM) -> int:
    """Replicas of a stage that keep up with the DiT, by the seconds of calls that an HQ clip takes."""
    dit = sum(TRAITS[s].seconds for s in DIFFUSION_STAGES if with_stage2 or s != Stage.STAGE2)
    return max(1, math.ceil(headroom * dit_gpus * TRAITS[stage].seconds / dit))


@dataclass(frozen=True)
class OutputSizing:
    """What decides the pools of text and decode, besides the DiT.

    `text`, `decode`: numbers of replicas that the user gave. `roomy`: whether GPUs have 64 GiB. `nodes`: those with
    GPUs; none when they are not known yet.
    """

    text: int | None = None
    decode: int | None = None
    with_stage2: bool = True
    roomy: bool = True
    nodes: Sequence[Node] = ()

    @property
    def _parts(self) -> _Parts:
        return _ROOMY if self.roomy else _NARROW

    def own_gpus(self, gpus: float) -> int:
        """GPUs out of `gpus` that text and decode get for themselves, where they do not run beside the DiT."""
        parts = self._parts
        decode = self.decode or needed(Stage.DECODE, gpus - 1, self.with_stage2, headroom=1.0)
        memory = math.ceil((parts.text * (self.text or 1) + parts.decode * decode) / parts.all)
        return max(math.ceil(gpus / (_DIT_GPUS_PER_OUTPUT_GPU + 1)), memory)

    def fewest_cpus(self, dit_gpus: float) -> int:
        """CPUs of the pools beside a DiT of so many ranks, when a replica has one alone."""
        return (self.text or 1) + (self.decode or needed(Stage.DECODE, dit_gpus, self.with_stage2))

    def without_gpus(self) -> OutputPools:
        return OutputPools(self.text or 1, self.decode or 1)

    def on_own_gpus(self, dit_gpus: int, own_gpus: int) -> OutputPools:
        """The pools on `own_gpus` GPUs without ranks, for a DiT of `dit_gpus` ranks."""
        parts = self._parts
        text, most_text = _between(self.text, needed(Stage.TEXT, dit_gpus, self.with_stage2), own_gpus)
        places = (own_gpus * parts.all - parts.text * text) // parts.decode
        shares = (1.0, parts.text / parts.all, parts.decode / parts.all)
        return self._pools(text, most_text, places, shares, dit_gpus)

    def beside_one_gang(self, dit_gpus: int) -> OutputPools:
        """The pools beside ranks of a DiT that has one gang of each stage: both may share a GPU with the same rank."""
        text = self.text or 1
        share = _beside(text + (self.decode or 1))
        return self._pools(text, text, 1, (0.6, share, share), dit_gpus)

    def beside_ranks(self, dit_gpus: int) -> OutputPools:
        """The pools beside the ranks of a DiT, each replica beside another one."""
        most_text = max(1, int(_MOST_TEXT * dit_gpus))
        text, most_text = _between(self.text, needed(Stage.TEXT, dit_gpus, self.with_stage2), most_text)
        places = max(1, dit_gpus - text)
        share = _beside(math.ceil((text + (self.decode or 1)) / dit_gpus))
        return self._pools(text, most_text, places, (0.6, share, share), dit_gpus)

    def _pools(
        self, text: int, most_text: int, places: int, shares: tuple[float, float, float], dit_gpus: int
    ) -> OutputPools:
        need = self.decode or needed(Stage.DECODE, dit_gpus, self.with_stage2)
        cpus, places_by_cpus = _decode_cpus(need, _spare_cpus(self.nodes))
        decode, most_decode = _between(self.decode, need, max(1, min(places, places_by_cpus or places)))
        return OutputPools(
            text,
            decode,
            most_text if most_text > 1 and self.text is None else None,
            most_decode if most_decode > 1 and self.decode is None else None,
            *shares,
            decode_cpus=cpus,
        )


def _between(given: int | None, need: int, most: int) -> tuple[int, int]:
    """Replicas to begin with, and the most: what the user gave, or what is needed as far as there are places."""
    return (min(max(need, 1), most), most) if given is None else (given, given)


def _beside(replicas: int) -> float:
    """The part of a GPU that each of several single-rank replicas beside a rank asks for.

    A rank asks for more than half, so that two of a gang never share a GPU. Only as many as are meant to fit do.
    """
    return {1: 0.3, 2: 0.2}.get(replicas) or math.floor(400 / replicas) / 1000


def _spare_cpus(nodes: Sequence[Node]) -> list[float]:
    """CPUs of each node beside those of its ranks of the DiT, and of a replica of text on the one that has most."""
    spare = sorted((node.cpus - math.floor(node.gpus) for node in nodes), reverse=True)
    return [spare[0] - 1, *spare[1:]] if spare else []


def _decode_cpus(need: int, spare: Sequence[float]) -> tuple[int, int]:
    """CPUs that a replica of decode reserves, and how many replicas then fit: `need`, if that is possible.

    It reserves what the encoder's threads use. With fewer it is slower, and more replicas make up for that.
    """
    fitting = [(cpus, sum(int(max(free, 0) // cpus) for free in spare)) for cpus in range(ENCODER_THREADS, 0, -1)]
    if not fitting[-1][1]:
        return 1, 0  # The nodes are not known, or have a CPU for each rank alone.
    enough = (fit for fit in fitting if fit[1] * fit[0] >= need * ENCODER_THREADS)
    return next(enough, None) or max(fitting, key=lambda fit: (fit[0] * fit[1], fit[0]))
