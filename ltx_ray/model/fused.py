"""The transformer in few passes over memory: packed layers, fused steps between them, modulations by noise level.

It computes the function of `Transformer.forward` on the same parameters, for whole weights (one tensor-parallel rank)
that `packing.pack_linears` has laid out. A residual is not added where it arises, but by the step that reads the stream
next. Modulations are computed once for every noise level of a call and not for every token.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from ltx_ray.checkpoints.transformer_config import StreamConfig
from ltx_ray.checkpoints.transformer_keys import CROSS_ROWS, StreamNames
from ltx_ray.model import steps
from ltx_ray.model.attention_backends import attention_backend
from ltx_ray.model.block import (
    CROSS_ATTENTION_ROWS,
    FEED_FORWARD_ROWS,
    SELF_ATTENTION_ROWS,
    STREAM_NAMES,
    TEXT_ATTENTION_ROWS,
    AVBlock,
)
from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.rope import RopeTable, audio_positions, video_positions
from ltx_ray.model.steps import Activations, Modulation, Norm, Residual, TokenLevels
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.fp8 import FP8
from ltx_ray.records import AV
from ltx_ray.shapes import ClipShape

#: Compute capability (Ada) from which tensor cores multiply e4m3.
_FIRST_FP8 = (8, 9)


@dataclass(frozen=True)
class ModulationTables:
    """Modulations of a stream in all n blocks at L noise levels.

    own (n, L, 9, D), prompt (n, 1, 2, D), cross (n, L, 4, D), cross_gate (n, 1, 1, D), and before the last projection
    output (1, L, 2, D). Rows are those of docs/ltx-2.3.md#transformer.
    """

    own: torch.Tensor
    prompt: torch.Tensor
    cross: torch.Tensor
    cross_gate: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class _BlockTables:
    """A stream's tables of all n blocks, one after the other: own (n, 9, D), prompt (n, 2, D), cross (n, 5, D)."""

    own: torch.Tensor
    prompt: torch.Tensor
    cross: torch.Tensor


@dataclass
class _FusedStream:
    """A modality inside the blocks: x (R, D), to which `residual` is still to be added, and the text (S, D_text)."""

    x: torch.Tensor
    context: torch.Tensor
    rope: RopeTable
    cross_rope: RopeTable
    levels: TokenLevels | None
    tables: ModulationTables
    enabled: bool
    residual: Residual | None = None


class _AudioCudaStream:
    """Runs the audio's kernels, which are too small to fill a GPU, in a CUDA stream beside that of the video.

    A tensor that one of the CUDA streams made and the other reads must live until they `synchronize`. Its memory
    returns to the CUDA stream that allocated it, which does not know of the other's readers. On a CPU all this does
    nothing.
    """

    def __init__(self, device: torch.device):
        self._audio = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_video(self) -> None:
        """The audio waits for all that the video's CUDA stream has been given so far."""
        if self._audio is not None:
            self._audio.wait_stream(torch.cuda.current_stream(self._audio.device))

    def join_video(self) -> None:
        """The video waits for the audio. Every pass ends so, as the capture of a CUDA graph has to."""
        if self._audio is not None:
            torch.cuda.current_stream(self._audio.device).wait_stream(self._audio)

    def synchronize(self) -> None:
        """Each waits for the other."""
        self.join_video()
        self.wait_for_video()

    def running(self, names: StreamNames) -> AbstractContextManager:
        """A context whose work belongs to the modality with these names."""
        return (
            torch.cuda.stream(self._audio) if self._audio is not None and names is STREAM_NAMES.audio else nullcontext()
        )


class FusedTransformer:
    """Velocities from a packed Transformer, as `Transformer.forward` gives them.

    `attention` names a backend of attention_backends.py. Raises RuntimeError when the device lacks what the backend,
    the kernels or fp8 need.
    """

    def __init__(self, model: Transformer, attention: str = "sdpa"):
        self.model = model
        self._eps = model.config.norm_eps
        device = _output_weight(model).device
        layers = (layer for block in model.blocks for layer in block.packed_linears.values())
        quantized = next((layer for layer in layers if layer.quantized), None)
        if quantized is not None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            if torch.cuda.get_device_capability(device) < _FIRST_FP8:
                raise RuntimeError(f"precision fp8 needs a GPU that supports it, and {name} does not")
            check_fp8(quantized, name)
        streams = model.config.video, model.config.audio
        self._attend = attention_backend(attention, device, [stream.head_dim for stream in streams])
        self._steps = _steps_for(device)
        self._audio_stream = _AudioCudaStream(device)

        def stacked(names: StreamNames) -> _BlockTables:
            def of_blocks(table: str) -> torch.Tensor:
                return torch.stack([block.get_parameter(table).data for block in model.blocks])

            return _BlockTables(*(of_blocks(name) for name in (names.table, names.prompt_table, names.cross_table)))

        self._block_tables = STREAM_NAMES.map(stacked)
        self._last_tables: tuple[tuple[torch.Tensor, ...], AV[ModulationTables]] | None = None

    def ropes(self, positions: AV[torch.Tensor], dtype: torch.dtype) -> AV[tuple[RopeTable, RopeTable]]:
        """`Transformer.ropes` with the heads of a token contiguous: cos and sin (T, heads * head_dim / 2)."""

        def flat(table: torch.Tensor) -> torch.Tensor:
            assert len(table) == 1, table.shape
            return table[0].transpose(0, 1).flatten(1).contiguous()

        def flat_pair(tables: tuple[RopeTable, RopeTable]) -> tuple[RopeTable, RopeTable]:
            own, cross = (RopeTable(flat(table.cos), flat(table.sin)) for table in tables)
            return own, cross

        return self.model.ropes(positions, dtype).map(flat_pair)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run passes over a few tokens, so that the kernels are compiled before the first clip needs them."""
        weight = _output_weight(self.model)
        shape, config = ClipShape(num_frames=9, height=64, width=64, frame_rate=24.0), self.model.config

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=weight.dtype, device=weight.device)

        def modality(
            stream: StreamConfig, tokens: int, ropes: tuple[RopeTable, RopeTable], level_index: torch.Tensor | None
        ) -> Modality:
            sigma = torch.ones(1, device=weight.device)
            timesteps = sigma.reshape(1, 1).expand(1, 1 if level_index is None else 2)
            latent, context = zeros(1, tokens, stream.in_channels), zeros(1, 16, stream.context_dim)
            return Modality(latent, sigma, timesteps, context, *ropes, level_index=level_index)

        positions = AV(video_positions(shape, weight.device), audio_positions(shape.audio_latents, weight.device))
        tokens = AV(shape.video_tokens, shape.audio_latents)
        ropes = self.ropes(positions, weight.dtype)
        for level_index in (None, torch.zeros(shape.video_tokens, dtype=torch.int32, device=weight.device)):
            self(AV(config.video, config.audio).map(modality, tokens, ropes, AV(level_index, None)))

    def __call__(self, inputs: AV[Modality], perturbation: Perturbation = NO_PERTURBATION) -> AV[torch.Tensor]:
        """Velocities (B, T, C_out) of both streams. Batch entries share their timesteps and noise levels."""
        return self.run(inputs, self.tables(inputs), perturbation)

    def tables(self, inputs: AV[Modality]) -> AV[ModulationTables]:
        """The modulations of a call. Passes with the very same timestep tensors get those of the first of them."""
        levels = tuple(tensor for modality in inputs for tensor in (modality.timesteps, modality.sigma))
        last = self._last_tables
        if last is None or any(old is not new for old, new in zip(last[0], levels, strict=True)):
            tables = inputs.map(self._make_tables, inputs.swapped(), STREAM_NAMES, self._block_tables)
            last = self._last_tables = levels, tables
        return last[1]

    def run(self, inputs: AV[Modality], tables: AV[ModulationTables], perturbation: Perturbation) -> AV[torch.Tensor]:
        """A pass with given modulations. All that depends on values happens on the device, so it can be captured."""
        self._audio_stream.wait_for_video()
        streams = inputs.map(self._embed, tables, STREAM_NAMES)
        batch = inputs.video.latent.shape[0]
        for index, block in enumerate(self.model.blocks):
            self._run_block(streams, block, index, batch, perturbation)
        velocities = streams.map(lambda s, names: self._project_out(s, names).unflatten(0, (batch, -1)), STREAM_NAMES)
        self._audio_stream.join_video()
        return velocities

    def _make_tables(
        self, own: Modality, other: Modality, names: StreamNames, blocks: _BlockTables
    ) -> ModulationTables:
        model, dtype = self.model, own.latent.dtype
        scale = model.config.timestep_scale
        # Every batch entry has the timesteps of the first one.
        levels = own.timesteps[0] * scale

        def modulation(adaln: str, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows, embedded = model.get_submodule(adaln)(timesteps.flatten(), dtype)
            return rows.unflatten(1, (-1, embedded.shape[1])), embedded

        def plus_table(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return table[:, None].to(dtype) + rows[None]

        rows, embedded = modulation(names.adaln, levels)
        prompt, _ = modulation(names.prompt_adaln, own.sigma[:1] * scale)
        cross, _ = modulation(names.cross_adaln, levels)
        gate_factor = model.config.av_timestep_scale / scale
        cross_gate, _ = modulation(names.cross_gate_adaln, other.sigma[:1] * scale * gate_factor)
        return ModulationTables(
            own=plus_table(blocks.own, rows),
            prompt=plus_table(blocks.prompt, prompt),
            cross=plus_table(blocks.cross[:, :CROSS_ROWS], cross),
            cross_gate=plus_table(blocks.cross[:, CROSS_ROWS:], cross_gate),
            output=model.get_parameter(names.output_table)[None, None].to(dtype) + embedded[None, :, None],
        )

    def _embed(self, own: Modality, tables: ModulationTables, names: StreamNames) -> _FusedStream:
        patchify = getattr(self.model, names.patchify)
        levels = None if own.level_index is None else TokenLevels(own.level_index)
        with self._audio_stream.running(names):
            x = F.linear(own.latent.flatten(0, 1), patchify.weight, patchify.bias)
            context = own.context.flatten(0, 1).contiguous()
        return _FusedStream(x, context, own.rope, own.cross_rope, levels, tables, own.enabled)

    def _project_out(self, s: _FusedStream, names: StreamNames) -> torch.Tensor:
        proj_out = getattr(self.model, names.proj_out)
        shift, scale = s.tables.output[0].unbind(1)
        with self._audio_stream.running(names):
            (h,) = self._normed(s, [Modulation(shift, scale)], norm="layer")
            assert isinstance(h, torch.Tensor)
            return F.linear(h, proj_out.weight, proj_out.bias)

    def _normed(self, s: _FusedStream, modulations: Iterable[Modulation], norm: Norm = "rms") -> list[Activations]:
        """The stream, normed and modulated, after its residual has been added to it."""
        residual, s.residual = s.residual, None
        return self._steps.add_norm_modulate(s.x, residual, list(modulations), s.levels, norm, self._eps)

    def _run_block(
        self, streams: AV[_FusedStream], block: AVBlock, index: int, batch: int, perturbation: Perturbation
    ) -> None:
        for s, names, perturbed in zip(streams, STREAM_NAMES, perturbation.values_only, strict=True):
            if s.enabled:
                with self._audio_stream.running(names):
                    self._attend_to_self(s, block, names, index, batch, index in perturbed)
                    self._attend_to_text(s, block, names, index, batch)
        if not perturbation.isolated:
            self._attend_across(streams, block, index, batch)
        for s, names in zip(streams, STREAM_NAMES, strict=True):
            if s.enabled:
                with self._audio_stream.running(names):
                    self._feed_forward(s, block, names, index)

    def _attend_to_self(
        self, s: _FusedStream, block: AVBlock, names: StreamNames, index: int, batch: int, values_only: bool
    ) -> None:
        name = names.self_attention
        attention, packed = getattr(block, name), block.packed_linears
        qkv, gates = packed[name, "qkv"], packed[name, "gates"]
        shift, scale, gate = s.tables.own[index, :, SELF_ATTENTION_ROWS].unbind(1)
        (h,) = self._normed(s, [Modulation(shift, scale, qkv.quantized)])
        q, k, v = qkv.split(steps.linear(h, qkv))
        (logits,) = gates.split(steps.linear(h, gates))
        if values_only:
            heads_out = v.unflatten(1, (attention.heads, -1))
        else:
            weights = attention.q_norm.weight, attention.k_norm.weight
            self._steps.norm_heads_(list(zip((q, k), weights, strict=True)), attention.heads, self._eps, s.rope)
            heads_out = self._heads_out(q, k, v, attention.heads, batch)
        s.residual = Residual(self._gate_and_project(heads_out, logits, packed[name, "out"]), gate)

    def _attend_to_text(self, s: _FusedStream, block: AVBlock, names: StreamNames, index: int, batch: int) -> None:
        name, packed = names.text_attention, block.packed_linears
        q_gates, kv = packed[name, "q_gates"], packed[name, "kv"]
        shift, scale, gate = s.tables.own[index, :, TEXT_ATTENTION_ROWS].unbind(1)
        (h,) = self._normed(s, [Modulation(shift, scale, q_gates.quantized)])
        prompt_shift, prompt_scale = s.tables.prompt[index].unbind(1)
        (context,) = self._steps.add_norm_modulate(
            s.context, None, [Modulation(prompt_shift, prompt_scale, kv.quantized)], None, None, self._eps
        )
        s.residual = Residual(self._cross_attention(h, context, block, name, batch, None, None), gate)

    def _attend_across(self, streams: AV[_FusedStream], block: AVBlock, index: int, batch: int) -> None:
        """Attention from each enabled stream to the other.

        Both directions read the streams as they were before either was written, so each stream is normed once, and
        modulated for every direction in which it takes part.
        """
        packed = block.packed_linears
        receivers = [
            (names, rows)
            for s, names, rows in zip(streams, STREAM_NAMES, CROSS_ATTENTION_ROWS, strict=True)
            if s.enabled
        ]

        def inputs_of(s: _FusedStream, names: StreamNames) -> list[Activations]:
            def modulation(receiver: StreamNames, rows: slice) -> Modulation:
                layer = packed[receiver.cross_attention, "q_gates" if receiver is names else "kv"]
                scale, shift = s.tables.cross[index, :, rows].unbind(1)
                return Modulation(shift, scale, layer.quantized)

            with self._audio_stream.running(names):
                return self._normed(s, [modulation(*receiver) for receiver in receivers])

        normed = streams.map(inputs_of, STREAM_NAMES)
        self._audio_stream.synchronize()

        def attend(
            s: _FusedStream,
            names: StreamNames,
            own: list[Activations],
            other: _FusedStream,
            others: list[Activations],
        ) -> None:
            if not s.enabled:
                return
            number = next(n for n, (receiver, _) in enumerate(receivers) if receiver is names)
            with self._audio_stream.running(names):
                y = self._cross_attention(
                    own[number], others[number], block, names.cross_attention, batch, s.cross_rope, other.cross_rope
                )
            s.residual = Residual(y, s.tables.cross_gate[index, :, 0])

        streams.map(attend, STREAM_NAMES, normed, streams.swapped(), normed.swapped())
        # Both CUDA streams read `normed`, whose life ends here.
        self._audio_stream.synchronize()

    def _cross_attention(
        self,
        h: Activations,
        context: Activations,
        block: AVBlock,
        name: str,
        batch: int,
        q_rope: RopeTable | None,
        k_rope: RopeTable | None,
    ) -> torch.Tensor:
        """Attention `name` of the block from queries of `h` to keys and values of `context`: (R, D)."""
        attention, packed = getattr(block, name), block.packed_linears
        q_gates, kv = packed[name, "q_gates"], packed[name, "kv"]
        q, logits = q_gates.split(steps.linear(h, q_gates))
        k, v = kv.split(steps.linear(context, kv))
        self._steps.norm_heads_([(q, attention.q_norm.weight)], attention.heads, self._eps, q_rope)
        self._steps.norm_heads_([(k, attention.k_norm.weight)], attention.heads, self._eps, k_rope)
        return self._gate_and_project(self._heads_out(q, k, v, attention.heads, batch), logits, packed[name, "out"])

    def _heads_out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, batch: int) -> torch.Tensor:
        """Attention of q, k and v (R, heads * head_dim): (R, heads, head_dim)."""
        by_head = (x.unflatten(0, (batch, -1)).unflatten(2, (heads, -1)) for x in (q, k, v))
        return self._attend(*by_head).flatten(0, 1)

    def _gate_and_project(self, heads_out: torch.Tensor, logits: torch.Tensor, out: PackedLinear) -> torch.Tensor:
        if heads_out.stride(1) != heads_out.shape[2] or heads_out.stride(2) != 1:
            # Unlike `contiguous`, this gives an axis of a single head the stride that the kernel expects, too.
            heads_out = heads_out.flatten(1).unflatten(1, heads_out.shape[1:])
        return steps.linear(self._steps.apply_gates(heads_out, logits, out.quantized), out)

    def _feed_forward(self, s: _FusedStream, block: AVBlock, names: StreamNames, index: int) -> None:
        packed = block.packed_linears
        up, down = packed[names.feed_forward, "up"], packed[names.feed_forward, "down"]
        shift, scale, gate = s.tables.own[index, :, FEED_FORWARD_ROWS].unbind(1)
        (h,) = self._normed(s, [Modulation(shift, scale, up.quantized)])
        if up.quantized or down.quantized:
            hidden = self._steps.gelu(steps.linear(h, up), down.quantized)
        else:
            hidden = self._steps.linear_gelu(h, up)
        s.residual = Residual(steps.linear(hidden, down), gate)


def check_fp8(layer: PackedLinear, device_name: str) -> None:
    """Raise RuntimeError where PyTorch has no fp8 products with a scale for each row for the device of `layer`."""
    rows = torch.zeros((steps.MIN_FP8_ROWS, layer.weight.shape[1]), device=layer.weight.device)
    try:
        steps.linear(steps.QuantizedRows(rows.to(FP8), torch.ones_like(rows[:, :1])), layer)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise RuntimeError(
            f"precision fp8 needs a PyTorch with its products for {device_name} ({why}); legal: --precision bf16"
        ) from error


def _output_weight(model: Transformer) -> torch.Tensor:
    return model.get_parameter(f"{STREAM_NAMES.video.proj_out}.weight")


def _steps_for(device: torch.device) -> ModuleType:
    """The implementation of the fused steps on `device`: steps.py, or kernels.py on CUDA."""
    if device.type != "cuda":
        return steps
    try:
        from ltx_ray.model import kernels  # Triton is not installed everywhere.

        kernels.gelu(torch.zeros((1, 16), dtype=torch.bfloat16, device=device), False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"the fused path needs Triton and a C compiler on every GPU node ({type(error).__name__}: {error}); "
            "legal: --compile off"
        ) from error
    return kernels
