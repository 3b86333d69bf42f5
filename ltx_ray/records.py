"""The records that flow through a run: requests, items, results, reports. No torch here: tensors are typed `Any`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, Generic, TypeVar

from ltx_ray.shapes import ClipShape

T = TypeVar("T")
U = TypeVar("U")

#: A clip is frozen when one still stretch has more than this share of its frames.
FROZEN_SHARE = 0.5
#: A clip with less sound than this is silent. In one shorter than a block of loudness, anything audible counts.
SILENT_SECONDS, SHORT_CLIP_SECONDS = 0.05, 0.4


class ErrorKind(StrEnum):
    """What the failure of a call says of the row, the machine and the replica."""

    #: The row cannot be rendered on any replica. It fails without another attempt.
    ROW = "row"
    #: Memory, a disk, the network or a store failed. No row is to blame.
    INFRASTRUCTURE = "infrastructure"
    #: The row is tried again, and blamed once every attempt has ended so.
    UNKNOWN = "unknown"
    #: The replica is broken, whatever the row, and must not serve another one.
    REPLICA = "replica"
    #: The state of the replica's processes is unknown, so the replica is replaced.
    PROCESS = "process"
    #: The GPU failed, and its process with it. If that happens again there, the card is left alone.
    DEVICE = "device"
    #: The node cannot compute as the run does, whatever replica starts there.
    NODE = "node"
    #: The latents are not finite. The row is tried once on another node before it is blamed.
    NOT_FINITE = "not_finite"
    #: A file of the model cannot be used, by any row on any replica. The run ends.
    MODEL = "model"
    #: The item starts over without its stored latents.
    STORED_LATENTS_GONE = "stored_latents_gone"


class RenderError(Exception):
    """An error whose `kind` decides what becomes of the row and of the replica."""

    kind: ClassVar[ErrorKind]


class RowError(RenderError):
    """The row cannot be rendered on any replica."""

    kind = ErrorKind.ROW


class NotFinite(RowError):
    """A clip's latents are not finite, because of the row, or because the node computes wrongly."""

    kind = ErrorKind.NOT_FINITE


class UnfitNode(RenderError, RuntimeError):
    """This node lacks what the run's numerics need: a package, a compiler, or another model of GPU."""

    kind = ErrorKind.NODE


class WrongDevice(RenderError):
    """The noise of this clip was drawn on a device of another model, so this replica cannot continue with it."""

    kind = ErrorKind.INFRASTRUCTURE


class ReplicaError(RenderError):
    """The replica's weights are in an unknown state, or its ranks do not compute the same."""

    kind = ErrorKind.REPLICA


class ModelError(RenderError):
    """A file of the model, or a LoRA, cannot be used, which showed only when its values were read."""

    kind = ErrorKind.MODEL


class StoredLatentsGone(RenderError):
    """There are no stored stage-1 latents from which stage 2 could resume; the message says where and why."""

    kind = ErrorKind.STORED_LATENTS_GONE


@dataclass(frozen=True)
class AV(Generic[T]):
    """A value for video and one for audio, so that code handles both streams in one expression."""

    video: T
    audio: T

    def map(self, fn: Callable[..., U], *others: AV[Any]) -> AV[U]:
        """`fn(self.video, *others.video)`, then the same for audio."""
        return AV(fn(self.video, *(o.video for o in others)), fn(self.audio, *(o.audio for o in others)))

    def swapped(self) -> AV[T]:
        """For each stream, what the other one has."""
        return AV(self.audio, self.video)

    def __iter__(self):
        return iter((self.video, self.audio))


@dataclass(frozen=True)
class Guidance:
    """Guidance of one modality: the manifest's columns without their `video_` or `audio_` prefix."""

    cfg_scale: float
    stg_scale: float
    rescale_scale: float
    modality_scale: float
    stg_blocks: tuple[int, ...]
    skip_step: int


#: The fields of a request that are those of a Guidance, in their order.
_VIDEO_GUIDANCE, _AUDIO_GUIDANCE = (
    attrgetter(*(f"{prefix}_{field.name}" for field in dataclasses.fields(Guidance))) for prefix in ("video", "audio")
)


@dataclass(frozen=True)
class ImageCondition:
    """A conditioning image of a row.

    `frame_idx`: the frame that it conditions. `strength`: 1 keeps the image, 0 ignores it. `crf`: quality of the H.264
    round trip before encoding, 0 for none; None for the default of the model's generation.
    """

    path: str
    frame_idx: int
    strength: float
    crf: int | None


@dataclass(frozen=True)
class LoraUse:
    """A user LoRA, declared with --lora under its file's stem, and its strength in this row."""

    name: str
    strength: float


@dataclass(frozen=True)
class RenderRequest:
    """A manifest row with every default resolved. The fields are the manifest's columns (docs/manifest.md)."""

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    frame_rate: float
    num_inference_steps: int
    video_cfg_scale: float
    video_stg_scale: float
    video_rescale_scale: float
    video_modality_scale: float
    video_stg_blocks: tuple[int, ...]
    video_skip_step: int
    audio_cfg_scale: float
    audio_stg_scale: float
    audio_rescale_scale: float
    audio_modality_scale: float
    audio_stg_blocks: tuple[int, ...]
    audio_skip_step: int
    distilled_lora_strength_stage_1: float
    distilled_lora_strength_stage_2: float
    loras: tuple[LoraUse, ...]
    images: tuple[ImageCondition, ...]
    pipeline: str
    id: str | None = None
    extra: str | None = None

    @property
    def shape(self) -> ClipShape:
        """The size of the finished clip."""
        return ClipShape(self.num_frames, self.height, self.width, self.frame_rate)

    @property
    def guidance(self) -> AV[Guidance]:
        return AV(Guidance(*_VIDEO_GUIDANCE(self)), Guidance(*_AUDIO_GUIDANCE(self)))

    def row(self) -> dict[str, Any]:
        """The request as plain lists and dicts, keyed by manifest column."""
        return plain(self)


@dataclass(frozen=True)
class Recipe:
    """What besides the request enters the item_id. Weight files count by digest, never by path.

    `noise_device` is the word of the option, "model" or "cpu". Neither the GPU's model, which decides the noise of
    "model", nor numerics and versions, which change bits within rounding, are known while rows are planned.
    """

    pipeline: str
    dtype: str
    precision: str
    noise_device: str
    checkpoint: str
    gemma: str
    upsampler: str
    distilled_lora: str | None
    distilled_lora_strengths: tuple[float, float]
    loras: tuple[tuple[str, float], ...] = ()
    #: How digests are made, and seeds of samples (docs/dataset.md#schemes).
    scheme: int = 1


class Negative(StrEnum):
    """Where a call of text is to leave the context of the negative prompt."""

    #: Within the conditions.
    WITHIN = "within"
    #: Apart from them, as bytes.
    SEPARATE = "separate"
    #: Nowhere, because the driver has it.
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class WorkItem:
    """One clip to render. Several manifest rows may share it."""

    item_id: str
    request: RenderRequest
    recipe: Recipe
    recipe_digest: str
    #: Digests of the request's images, in order. The workers refuse an image that has changed since it was planned.
    image_digests: tuple[str, ...] = ()
    #: Whether this is the tiny clip that only tries every pool. Nothing of it is published.
    preflight: bool = False
    negative: Negative = Negative.WITHIN


@dataclass(frozen=True)
class PromptContext:
    """The text contexts of one prompt: tensors (1, S, D_video) and (1, S, D_audio) on the host.

    `tokens`: tokens of the prompt among the S positions. `truncated`: whether the prompt was longer.
    """

    context: AV[Any]
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class ImageLatents:
    """A conditioning image encoded at the sizes of both stages: normalized latents (1, C, 1, H, W)."""

    frame_idx: int
    strength: float
    stage1: Any
    stage2: Any


@dataclass(frozen=True)
class Conditions:
    """The conditions of a clip, as the text stage makes them.

    `negative` is None when no guidance pass needs it, and when it travels apart (`WorkItem.negative`).
    """

    positive: PromptContext
    negative: PromptContext | None
    images: tuple[ImageLatents, ...] = ()


@dataclass(frozen=True)
class NoiseLedger:
    """Every draw of a clip's initial noise so far (docs/ltx-2.3.md#order-of-draws).

    A stage replays the draws to put a new generator into the state in which the stage before left it. `draws` holds
    (name, packed shape, dtype name). The numbers of a CUDA generator depend on the model of the GPU, `device_model`.
    """

    seed: int
    device: str
    device_model: str
    draws: tuple[tuple[str, tuple[int, ...], str], ...] = ()

    def extended(self, name: str, shape: tuple[int, ...], dtype: str) -> NoiseLedger:
        """The ledger with one more draw."""
        return dataclasses.replace(self, draws=(*self.draws, (name, tuple(shape), dtype)))


@dataclass(frozen=True)
class StageLatents:
    """The result of a diffusion stage: video latents (1, C, F, H, W) and audio latents (1, 8, T, 16) on the host.

    `numerics`: the numerics of the run that made them as JSON, "" where they are not known.
    `device_name`: the model of the GPU that made them, or "cpu"; "" where it is not known.
    """

    latents: AV[Any]
    ledger: NoiseLedger
    numerics: str = ""
    device_name: str = ""

    def other_numerics(self, numerics: str, device_name: str = "") -> str | None:
        """The numerics that made them as JSON, where they are known and not `numerics`.

        With noise of a CPU, stages may run on GPUs of several models, whose bits differ. Where `device_name` and that
        of the latents are known and differ, the latter is a field of the JSON.
        """
        if "" not in (self.device_name, device_name) and self.device_name != device_name:
            return canonical_json({**json.loads(self.numerics or "{}"), "device_name": self.device_name})
        return None if self.numerics in ("", numerics) else self.numerics


@dataclass(frozen=True)
class PictureMeasures:
    """Columns of the index, measured on the frames before they are encoded (docs/dataset.md#what-is-measured).

    Luma is in codes of limited range: 16 is black, 235 white. All are None when nothing was measured.

    mean_luma: the mean over all pixels and frames.
    black_share: the share of the frames that are black (engine/frames.py).
    motion: the median, over all frames but the first, of the share of blocks that have changed in eight frames; None
    for one frame.
    still_share: the longest stretch of frames that look like its first, as a share of all; None for one frame.
    sharpness: the median over the frames of the variance of the luma's Laplacian, in codes squared; None where a side
    is below 3 pixels.
    cuts: the number of hard cuts.
    """

    mean_luma: float | None = None
    black_share: float | None = None
    motion: float | None = None
    still_share: float | None = None
    sharpness: float | None = None
    cuts: int | None = None

    def flags(self) -> tuple[str, ...]:
        """What applies of "black" and "frozen"."""
        black = ("black",) if self.black_share == 1.0 else ()
        frozen = ("frozen",) if self.still_share is not None and self.still_share > FROZEN_SHARE else ()
        return black + frozen


@dataclass(frozen=True)
class SoundMeasures:
    """Columns of the index, measured on the samples before they are encoded.

    loudness_lufs: the integrated loudness of ITU-R BS.1770-4; None for silence and below 400 ms.
    clipped_samples: the number of samples at full scale, of both channels.
    sound_seconds: how long the sound is audible (engine/loudness.py).
    """

    loudness_lufs: float | None = None
    clipped_samples: int | None = None
    sound_seconds: float | None = None

    def flags(self, clip_seconds: float) -> tuple[str, ...]:
        """("silent",) where that applies, of a clip that lasts `clip_seconds`."""
        if self.sound_seconds is None:
            return ()
        short = clip_seconds < SHORT_CLIP_SECONDS
        return ("silent",) if self.sound_seconds == 0 or (self.sound_seconds < SILENT_SECONDS and not short) else ()


@dataclass(frozen=True)
class Clip:
    """A finished clip. `path` is relative to the root of the output; None for a preflight clip."""

    path: str | None
    sha256: str | None
    latents_sha256: str
    flags: tuple[str, ...]
    audio_stage: str
    picture: PictureMeasures = PictureMeasures()
    sound: SoundMeasures = SoundMeasures()


@dataclass(frozen=True)
class CallError:
    """Why a call failed on a rank. `type` is the name of the exception's class, for messages only."""

    kind: ErrorKind
    type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Evidence:
    """What a replica shows before it joins a run, so that every rank computes what the rows claim.

    `files`: digests of the model's files that it opened, by `ItemBuilder.digests`' names. `versions`: of packages;
    `kernels`: of those whose kernels it uses. `driver`: that of the GPU, "" on a CPU. `device`: the model of the GPU,
    or the kind of CPU. `answers`: digests of what it computes for a clip of a few tokens, by what that is.
    """

    files: Mapping[str, str]
    versions: Mapping[str, str | None]
    driver: str
    device: str
    answers: Mapping[str, str]
    kernels: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class EngineFacts:
    """What an engine tells of its last call, or of its start, beside the result; each sets what applies to it."""

    #: Model of the GPU, or "cpu"; decides the numbers of a noise generator.
    device_name: str = ""
    #: Where the weights without LoRAs and the LoRA factors are kept: "device", "host", "gang" or "file".
    clean_weights: str | None = None
    lora_factors: str | None = None
    prompt_truncated: bool = False
    #: The context of the negative prompt, where it is to be apart (engine/negative_context.py).
    negative: bytes | None = None
    #: The draws of noise so far, after a diffusion stage, and of a preview's stored latents.
    noise_ledger: NoiseLedger | None = None
    #: The numerics of stage 1 as JSON, where they or its GPU are others (`StageLatents.other_numerics`).
    stage1_numerics: str | None = None
    #: Where stored latents were read from or written to.
    stored_at: str | None = None
    #: Whether stored latents had no digest to be compared with.
    unchecked: bool = False
    #: After a start alone; None for engines whose results need none.
    evidence: Evidence | None = None
    #: The rung of engine.tiling.LADDER at which a clip was decoded.
    decode_rung: int | None = None
    #: Seconds of the parts of a start; in later reports, of what was left to do after it and has been done since.
    start_seconds: Mapping[str, float] | None = None


@dataclass(frozen=True)
class CallReport:
    """The small result of one engine call on one rank; payloads travel beside it. Times in seconds."""

    seconds: float
    #: When the call began, since the epoch.
    started: float
    switch_seconds: float = 0.0
    switches: int = 0
    device: str = ""
    error: CallError | None = None
    #: Size of the payload.
    nbytes: int = 0
    facts: EngineFacts = EngineFacts()
    requests: tuple[tuple[str, str, int], ...] = ()  # since the last report, as `storage.requests` counts them

    @property
    def ok(self) -> bool:
        return self.error is None


_SCALARS = frozenset({str, int, float, bool, type(None)})


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass; None for another class."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts, lists and scalars, for JSON and Parquet."""
    kind: type = type(value)
    if kind in _SCALARS:
        return value
    if (names := _field_names(kind)) is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def canonical_json(value: Any) -> str:
    """JSON with one spelling for equal values: sorted keys, no blanks, shortest floats, UTF-8 text."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def first_line(message: str | BaseException) -> str:
    """The first line of a message, or of an exception's; an exception without one is named by its class."""
    text = str(message).strip()
    if text:
        return text.splitlines()[0]
    return type(message).__name__ if isinstance(message, BaseException) else "no message"
