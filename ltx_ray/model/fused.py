"""The DiT in few passes over memory: packed products, fused steps between them, one noise level for many tokens.

The same function as `Transformer.forward` on the same parameters, for whole weights (one tensor-parallel rank) that
`packing.pack` has laid out. A residual is not added where it arises but by the step that next reads the stream, and
modulations are made once for every noise level of a call, not for every token.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from ltx_ray.checkpoints.transformer_config import StreamConfig
from ltx_ray.model import steps
from ltx_ray.model.attention_backends import backend
from ltx_ray.model.block import AVBlock
from ltx_ray.model.packing import PackedLinear
from ltx_ray.model.rope import RopeTable, audio_positions, video_positions
from ltx_ray.model.steps import Levels, Modulation, Residual, Rows
from ltx_ray.model.transformer import NO_PERTURBATION, AdaLayerNorm, Modality, Perturbation, Transformer
from ltx_ray.parallel.fp8 import FP8
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape

#: Compute capability (Ada) from which tensor cores know e4m3.
_FIRST_FP8 = (8, 9)


@dataclass(frozen=True)
class _Names:
    """What a stream's parts are called in a block and in the transformer."""

    attn: str
    text: str
    bridge: str
    ff: str
    table: str
    prompt_table: str
    cross_table: str
    adaln: str
    prompt_adaln: str
    cross_adaln: str
    gate_adaln: str
    patchify: str
    project: str


_NAMES = AV(
    _Names(
        "attn1", "attn2", "audio_to_video_attn", "ff", "scale_shift_table", "prompt_scale_shift_table",
        "scale_shift_table_a2v_ca_video", "adaln_single", "prompt_adaln_single",
        "av_ca_video_scale_shift_adaln_single", "av_ca_a2v_gate_adaln_single", "patchify_proj", "proj_out",
    ),
    _Names(
        "audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff", "audio_scale_shift_table",
        "audio_prompt_scale_shift_table", "scale_shift_table_a2v_ca_audio", "audio_adaln_single",
        "audio_prompt_adaln_single", "av_ca_audio_scale_shift_adaln_single", "av_ca_v2a_gate_adaln_single",
        "audio_patchify_proj", "audio_proj_out",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Modulations of a stream in all blocks at L levels: main (n, L, 9, D), prompt (n, 1, 2, D), cross (n, L, 4, D),
    cross_gate (n, 1, 1, D), and of its way out (1, L, 2, D)."""

    main: torch.Tensor
    prompt: torch.Tensor
    cross: torch.Tensor
    cross_gate: torch.Tensor
    leave: torch.Tensor


@dataclass
class _Stream:
    """A modality on its way through the blocks: x (R, D), to which `residual` is still to be added."""

    x: torch.Tensor
    context: torch.Tensor
    rope: RopeTable
    cross_rope: RopeTable
    levels: Levels | None
    tables: Tables
    enabled: bool
    residual: Residual | None = None


class _Lanes:
    """The video's work in the current CUDA stream, and the audio's beside it: its kernels are too small for a GPU.

    What one lane made and the other reads must live until they `meet` again: the memory goes back to the lane that
    took it, which knows nothing of the other's readers.
    """

    def __init__(self, device: torch.device):
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self) -> None:
        """The audio's lane waits for all that the video's has been given so far."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))

    def join(self) -> None:
        """The other way round; a pass ends with it, as the capture of a graph has to."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def meet(self) -> None:
        """Each lane waits for the other."""
        self.join()
        self.fork()

    def of(self, names: _Names) -> AbstractContextManager:
        """Work in here belongs to the lane of the stream with these names."""
        aside = self._side is not None and names is _NAMES.audio
        return torch.cuda.stream(self._side) if aside else nullcontext()


class FusedTransformer:
    """Velocities from a packed Transformer, as `Transformer.forward` gives them.

    `attention` names a backend. Raises RuntimeError when the device has not what that needs.
    """

    def __init__(self, model: Transformer, attention: str = "sdpa"):
        self.model = model
        self._eps = model.config.norm_eps
        device = model.proj_out.weight.device
        products = (product for block in model.transformer_blocks for product in block.products.values())
        quantized = next((product for product in products if product.quantized), None)
        if quantized is not None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            if torch.cuda.get_device_capability(device) < _FIRST_FP8:
                raise RuntimeError(f"precision fp8 needs a GPU that knows it, and {name} does not")
            try_fp8(quantized, name)
        self._attend = backend(attention, device)
        self._steps = _steps(device)
        self._lanes = _Lanes(device)

        def stacked(names: _Names) -> dict[str, torch.Tensor]:
            def of_blocks(table: str) -> torch.Tensor:
                return torch.stack([block.get_parameter(table).data for block in model.transformer_blocks])

            return {kind: of_blocks(getattr(names, kind)) for kind in ("table", "prompt_table", "cross_table")}

        self._stacked = _NAMES.map(stacked)
        self._last: tuple[tuple[torch.Tensor, ...], AV[Tables]] | None = None

    def ropes(self, positions: AV[torch.Tensor], dtype: torch.dtype) -> AV[tuple[RopeTable, RopeTable]]:
        """As `Transformer.ropes`, with the heads of a token side by side: cos and sin (T, heads * head_dim / 2)."""

        def flat(table: torch.Tensor) -> torch.Tensor:
            assert len(table) == 1, table.shape
            return table[0].transpose(0, 1).flatten(1).contiguous()

        def both(tables: tuple[RopeTable, RopeTable]) -> tuple[RopeTable, ...]:
            return tuple(RopeTable(flat(table.cos), flat(table.sin)) for table in tables)

        return self.model.ropes(positions, dtype).map(both)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Passes over a few tokens, so that the kernels are built before the first clip needs them."""
        weight = self.model.proj_out.weight
        shape, config = ClipShape(num_frames=9, height=64, width=64, frame_rate=24.0), self.model.config

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=weight.dtype, device=weight.device)

        def modality(stream: StreamConfig, tokens: int, tables: tuple[RopeTable, RopeTable], of: torch.Tensor | None):
            level = torch.ones(1, device=weight.device)
            times = level.reshape(1, 1).expand(1, 1 if of is None else 2)
            latent, context = zeros(1, tokens, stream.in_channels), zeros(1, 16, stream.context_dim)
            return Modality(latent, level, times, context, *tables, level_of=of)

        positions = AV(video_positions(shape, weight.device), audio_positions(shape.audio_latents, weight.device))
        tokens = AV(shape.video_tokens, shape.audio_latents)
        ropes = self.ropes(positions, weight.dtype)
        for of in (None, torch.zeros(shape.video_tokens, dtype=torch.int32, device=weight.device)):
            self(AV(config.video, config.audio).map(modality, tokens, ropes, AV(of, None)))

    def __call__(self, inputs: AV[Modality], perturbation: Perturbation = NO_PERTURBATION) -> AV[torch.Tensor]:
        """Velocities (B, T, C_out) of both streams; batch entries share their timesteps and noise levels."""
        return self.run(inputs, self.tables(inputs), perturbation)

    def tables(self, inputs: AV[Modality]) -> AV[Tables]:
        """The modulations of a call; its passes have the very same levels, so they are made for the first of them."""
        levels = tuple(tensor for modality in inputs for tensor in (modality.timesteps, modality.sigma))
        if self._last is None or any(old is not new for old, new in zip(self._last[0], levels, strict=True)):
            made = inputs.map(self._make_tables, AV(inputs.audio, inputs.video), _NAMES, self._stacked)
            self._last = levels, made
        return self._last[1]

    def run(self, inputs: AV[Modality], tables: AV[Tables], perturbation: Perturbation) -> AV[torch.Tensor]:
        """A pass with `tables` for modulations. All that depends on values happens on the device."""
        self._lanes.fork()
        streams = inputs.map(self._enter, tables, _NAMES)
        batch = inputs.video.latent.shape[0]
        for index, block in enumerate(self.model.transformer_blocks):
            self._block(streams, block, index, batch, perturbation)
        left = streams.map(lambda s, names: self._leave(s, names).unflatten(0, (batch, -1)), _NAMES)
        self._lanes.join()
        return left

    def _make_tables(self, own: Modality, other: Modality, names: _Names, stacked: dict) -> Tables:
        model, dtype = self.model, own.latent.dtype
        scale = model.config.timestep_scale
        # every batch entry has the timesteps of the first
        levels = own.timesteps[0] * scale

        def made(adaln: str, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            layer: AdaLayerNorm = model.get_submodule(adaln)
            rows, embedded = layer(timesteps.flatten(), dtype)
            return rows.unflatten(1, (-1, embedded.shape[1])), embedded

        def added(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return table[:, None].to(dtype) + rows[None]

        rows, embedded = made(names.adaln, levels)
        prompt, _ = made(names.prompt_adaln, own.sigma[:1] * scale)
        cross, _ = made(names.cross_adaln, levels)
        gate_factor = model.config.av_timestep_scale / scale
        cross_gate, _ = made(names.gate_adaln, other.sigma[:1] * scale * gate_factor)
        leave = model.get_parameter(names.table)[None, None].to(dtype) + embedded[None, :, None]
        return Tables(
            main=added(stacked["table"], rows),
            prompt=added(stacked["prompt_table"], prompt),
            cross=added(stacked["cross_table"][:, :4], cross),
            cross_gate=added(stacked["cross_table"][:, 4:], cross_gate),
            leave=leave,
        )

    def _enter(self, own: Modality, tables: Tables, names: _Names) -> _Stream:
        patchify = self.model.get_submodule(names.patchify)
        levels = None if own.level_of is None else Levels(own.level_of)
        with self._lanes.of(names):
            x = F.linear(own.latent.flatten(0, 1), patchify.weight, patchify.bias)
            context = own.context.flatten(0, 1).contiguous()
        return _Stream(x, context, own.rope, own.cross_rope, levels, tables, own.enabled)

    def _leave(self, s: _Stream, names: _Names) -> torch.Tensor:
        project = self.model.get_submodule(names.project)
        shift, scale = s.tables.leave[0].unbind(1)
        with self._lanes.of(names):
            (h,) = self._read(s, [Modulation(shift, scale)], norm="layer")
            return F.linear(h, project.weight, project.bias)

    def _read(self, s: _Stream, modulations: Iterable[Modulation], norm: str = "rms") -> list[Rows]:
        """The stream, normed and modulated; its residual is added on the way."""
        residual, s.residual = s.residual, None
        return self._steps.modulated(s.x, residual, list(modulations), s.levels, norm, self._eps)

    def _block(self, streams: AV[_Stream], block: AVBlock, index: int, batch: int, perturbation: Perturbation) -> None:
        for s, names, perturbed in zip(streams, _NAMES, perturbation.values_only, strict=True):
            if s.enabled:
                with self._lanes.of(names):
                    self._attend_self(s, block, names, index, batch, index in perturbed)
                    self._attend_text(s, block, names, index, batch)
        if not perturbation.isolated:
            self._attend_across(streams, block, index, batch)
        for s, names in zip(streams, _NAMES, strict=True):
            if s.enabled:
                with self._lanes.of(names):
                    self._feed_forward(s, block, names, index)

    def _attend_self(
        self, s: _Stream, block: AVBlock, names: _Names, index: int, batch: int, values_only: bool
    ) -> None:
        attention, qkv = getattr(block, names.attn), block.products[names.attn, "qkv"]
        gates = block.products[names.attn, "gates"]
        shift, scale, gate = (s.tables.main[index, :, row] for row in (0, 1, 2))
        (h,) = self._read(s, [Modulation(shift, scale, qkv.quantized)])
        q, k, v = qkv.split(steps.product(h, qkv))
        (logits,) = gates.split(steps.product(h, gates))
        if values_only:
            heads_out = v.unflatten(1, (attention.heads, -1))
        else:
            norms = attention.q_norm.weight, attention.k_norm.weight
            self._steps.norm_heads_(list(zip((q, k), norms, strict=True)), attention.heads, self._eps, s.rope)
            heads_out = self._heads_out(q, k, v, attention.heads, batch)
        s.residual = Residual(self._out(heads_out, logits, block.products[names.attn, "out"]), gate)

    def _attend_text(self, s: _Stream, block: AVBlock, names: _Names, index: int, batch: int) -> None:
        q_gates, kv = block.products[names.text, "q_gates"], block.products[names.text, "kv"]
        shift, scale, gate = (s.tables.main[index, :, row] for row in (6, 7, 8))
        (h,) = self._read(s, [Modulation(shift, scale, q_gates.quantized)])
        shift, scale = (s.tables.prompt[index, :, row] for row in (0, 1))
        (context,) = self._steps.modulated(
            s.context, None, [Modulation(shift, scale, kv.quantized)], None, None, self._eps
        )
        y = self._attend_other(h, context, block, names.text, batch, None, None)
        s.residual = Residual(y, gate)

    def _attend_across(self, streams: AV[_Stream], block: AVBlock, index: int, batch: int) -> None:
        def modulation(s: _Stream, row: int, product: PackedLinear) -> Modulation:
            scale, shift = s.tables.cross[index, :, row], s.tables.cross[index, :, row + 1]
            return Modulation(shift, scale, product.quantized)

        # rows 0 and 1 belong to what the video asks of the audio, 2 and 3 to the way back; both directions read the
        # streams as they were before either wrote
        rows = AV(0, 2)
        asked = [
            (names.bridge, row, to)
            for names, row, to, stream in zip(_NAMES, rows, ("video", "audio"), streams, strict=True)
            if stream.enabled
        ]

        def read(s: _Stream, own: str, names: _Names) -> list[Rows]:
            def of(bridge: str, row: int, to: str) -> Modulation:
                return modulation(s, row, block.products[bridge, "q_gates" if to == own else "kv"])

            with self._lanes.of(names):
                return self._read(s, [of(*one) for one in asked])

        video, audio = streams.map(read, AV("video", "audio"), _NAMES)
        self._lanes.meet()
        for number, (bridge, _, to) in enumerate(asked):
            s, other = (streams.video, streams.audio) if to == "video" else (streams.audio, streams.video)
            h, context = (video, audio) if to == "video" else (audio, video)
            with self._lanes.of(_NAMES.video if to == "video" else _NAMES.audio):
                y = self._attend_other(h[number], context[number], block, bridge, batch, s.cross_rope, other.cross_rope)
            s.residual = Residual(y, s.tables.cross_gate[index, :, 0])
        # `video` and `audio` were read by both lanes, and end here
        self._lanes.meet()

    def _attend_other(
        self, h: Rows, context: Rows, block: AVBlock, name: str, batch: int, q_rope: RopeTable | None,
        k_rope: RopeTable | None,
    ) -> torch.Tensor:  # fmt: skip
        attention, products = getattr(block, name), block.products
        q, logits = products[name, "q_gates"].split(steps.product(h, products[name, "q_gates"]))
        k, v = products[name, "kv"].split(steps.product(context, products[name, "kv"]))
        self._steps.norm_heads_([(q, attention.q_norm.weight)], attention.heads, self._eps, q_rope)
        self._steps.norm_heads_([(k, attention.k_norm.weight)], attention.heads, self._eps, k_rope)
        return self._out(self._heads_out(q, k, v, attention.heads, batch), logits, products[name, "out"])

    def _heads_out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, batch: int) -> torch.Tensor:
        """Attention over rows of heads side by side: (R, heads, D)."""
        by_head = (x.unflatten(0, (batch, -1)).unflatten(2, (heads, -1)) for x in (q, k, v))
        return self._attend(*by_head).flatten(0, 1)

    def _out(self, heads_out: torch.Tensor, logits: torch.Tensor, out: PackedLinear) -> torch.Tensor:
        if heads_out.stride(1) != heads_out.shape[2] or heads_out.stride(2) != 1:
            heads_out = heads_out.contiguous()
        return steps.product(self._steps.gated(heads_out, logits, out.quantized), out)

    def _feed_forward(self, s: _Stream, block: AVBlock, names: _Names, index: int) -> None:
        up, down = block.products[names.ff, "up"], block.products[names.ff, "down"]
        shift, scale, gate = (s.tables.main[index, :, row] for row in (3, 4, 5))
        (h,) = self._read(s, [Modulation(shift, scale, up.quantized)])
        if up.quantized or down.quantized:
            hidden = self._steps.gelu(steps.product(h, up), down.quantized)
        else:
            hidden = self._steps.gelu_product(h, up)
        s.residual = Residual(steps.product(hidden, down), gate)


def try_fp8(product: PackedLinear, device_name: str) -> None:
    """Raise RuntimeError where PyTorch has no products in fp8 with a scale a row for the device of `product`."""
    rows = torch.zeros((steps.FP8_ROWS, product.weight.shape[1]), device=product.weight.device)
    try:
        steps.product(steps.Quantized(rows.to(FP8), torch.ones_like(rows[:, :1])), product)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise RuntimeError(
            f"precision fp8 needs a PyTorch with its products for {device_name} ({why}); legal: --precision bf16"
        ) from error


def _steps(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return steps
    try:
        from ltx_ray.model import kernels  # needs Triton, which is not everywhere

        kernels.gelu(torch.zeros((1, 16), dtype=torch.bfloat16, device=device), False)
    except Exception as error:
        raise RuntimeError(
            f"the fused path needs Triton and a C compiler on every GPU node ({type(error).__name__}: {error}); "
            "legal: --compile off"
        ) from error
    return kernels
