"""The transformer in few passes over memory: packed layers, fused steps between them, modulations by noise level.

It computes the function of `Transformer.forward` on the same parameters, which `packing.pack_linears` has laid out.
Modulations are computed once for every noise level of a call and not for every token.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F

from ltx_ray.checkpoints.transformer_config import StreamConfig, TransformerConfig
from ltx_ray.checkpoints.transformer_keys import StreamNames
from ltx_ray.model import steps
from ltx_ray.model.attention_backends import attention_backend
from ltx_ray.model.audio_stream import AudioCudaStream
from ltx_ray.model.block import STREAM_NAMES
from ltx_ray.model.fused_block import FusedBlocks, FusedStream
from ltx_ray.model.modulations import Modulations, ModulationTables
from ltx_ray.model.packed_linear import PackedLinear
from ltx_ray.model.rope import RopeTable, audio_positions, video_positions
from ltx_ray.model.steps import Modulation, TokenLevels
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Prefix, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.parallel.fp8 import FP8
from ltx_ray.parallel.mesh import RowSharding, SequenceSharding
from ltx_ray.records import AV, UnfitNode
from ltx_ray.shapes import ClipShape

#: Compute capability (Ada) from which tensor cores multiply e4m3.
_FIRST_FP8 = (8, 9)
#: Rows from which a product of its own is no slower than its part of a larger one, and the pieces after which the first
#: and the last exchange, which nothing hides, are short enough.
_PIECE_ROWS, _MOST_PIECES = 4000, 4


def check_node(config: TransformerConfig, attention: str, device: torch.device) -> None:
    """Raise UnfitNode when this node lacks what the attention or the kernels need, before the weights are read."""
    attention_backend(attention, device, _head_dims(config))
    _steps_for(device)


def _head_dims(config: TransformerConfig) -> tuple[int, ...]:
    return config.video.head_dim, config.audio.head_dim


class FusedTransformer:
    """Velocities from a packed Transformer, as `Transformer.forward` gives them.

    `attention` names a backend of attention_backends.py. Raises UnfitNode when the node lacks what the backend, the
    kernels or fp8 need.
    """

    def __init__(self, model: Transformer, attention: str = "sdpa"):
        self.model = model
        device = _output_weight(model).device
        layers = (layer for block in model.blocks for layer in block.packed_linears.values())
        quantized = next((layer for layer in layers if layer.quantized), None)
        if quantized is not None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            if torch.cuda.get_device_capability(device) < _FIRST_FP8:
                raise UnfitNode(f"precision fp8 needs a GPU that supports it, and {name} does not")
            check_fp8(quantized, name)
        attend = attention_backend(attention, device, _head_dims(model.config))
        self._audio_stream = AudioCudaStream(device)
        self._blocks = FusedBlocks(attend, _steps_for(device), self._audio_stream, model.tp, model.config.norm_eps)
        self._modulations = Modulations(model)

    def ropes(
        self, positions: AV[torch.Tensor], dtype: torch.dtype, sequence_group: RankGroup = SINGLE_RANK
    ) -> AV[tuple[RopeTable, RopeTable]]:
        """`Transformer.ropes` with the heads of a token contiguous: cos and sin (T, heads * head_dim / 2).

        The video's are for this rank's tokens where `sequence_group` divides them.
        """
        video_tokens = SequenceSharding(sequence_group, positions.video.shape[2])

        def flat(table: torch.Tensor, tokens: SequenceSharding | None) -> torch.Tensor:
            assert len(table) == 1, table.shape
            by_token = table[0].transpose(0, 1).flatten(1)
            return (by_token if tokens is None else tokens.own_shard(by_token, 0)).contiguous()

        def flat_pair(
            tables: tuple[RopeTable, RopeTable], tokens: SequenceSharding | None
        ) -> tuple[RopeTable, RopeTable]:
            own, cross = (RopeTable(flat(table.cos, tokens), flat(table.sin, tokens)) for table in tables)
            return own, cross

        divided = AV(video_tokens if sequence_group.size > 1 else None, None)
        return self.model.ropes(positions, dtype).map(flat_pair, divided)

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

    def __call__(
        self,
        inputs: AV[Modality],
        perturbation: Perturbation = NO_PERTURBATION,
        sequence_group: RankGroup = SINGLE_RANK,
        prefix: Prefix | None = None,
    ) -> AV[torch.Tensor]:
        """Velocities (B, T, C_out) of both streams. Batch entries share their timesteps and noise levels.

        `sequence_group` and `prefix` as in `Transformer.forward`, with the ropes of the group's ranks.
        """
        return self.run(inputs, self.tables(inputs), perturbation, sequence_group, prefix)

    def tables(self, inputs: AV[Modality]) -> AV[ModulationTables]:
        """The modulations of a call. Passes with the very same timestep tensors get those of the first of them."""
        return self._modulations.of(inputs)

    def run(
        self,
        inputs: AV[Modality],
        tables: AV[ModulationTables],
        perturbation: Perturbation,
        sequence_group: RankGroup = SINGLE_RANK,
        prefix: Prefix | None = None,
    ) -> AV[torch.Tensor]:
        """A pass with given modulations. All that depends on values happens on the device, so it can be captured."""
        self.model.tp.begin()
        sequence_group.begin()
        self._audio_stream.wait_for_video()
        tokens = SequenceSharding(sequence_group, inputs.video.latent.shape[1])
        divided = AV(tokens if sequence_group.size > 1 else None, None)
        begun = AV(None, None) if prefix is None or prefix.streams is None else prefix.streams
        streams = inputs.map(self._embed, tables, STREAM_NAMES, divided, begun)
        first = 0 if prefix is None or prefix.streams is None else prefix.length
        for index, block in enumerate(self.model.blocks[first:], first):
            if prefix is not None and prefix.streams is None and index == prefix.length:
                prefix.streams = streams.map(self._blocks.first_entry)
            values_only = perturbation.values_only.map(lambda blocks, i=index: i in blocks)
            self._blocks.run(streams, block, index, values_only, perturbation.isolated)
        own = streams.map(self._project_out, STREAM_NAMES)
        self._audio_stream.join_video()
        return streams.map(_whole_velocities, own)

    def _embed(
        self,
        own: Modality,
        tables: ModulationTables,
        names: StreamNames,
        tokens: SequenceSharding | None,
        begun: torch.Tensor | None,
    ) -> FusedStream:
        """The stream before the first block, or with the x (T, D) that a pass has `begun`."""
        patchify = getattr(self.model, names.patchify)
        batch = own.latent.shape[0]
        with self._audio_stream.running(names):
            latent, index = own.latent, own.level_index
            if tokens is not None:
                latent, index = tokens.own_shard(latent, 1), None if index is None else tokens.own_shard(index, 0)
            length = batch * latent.shape[1]
            pieces = row_pieces(length) if self.model.tp.size > 1 and names is STREAM_NAMES.video else 1
            rows = RowSharding(self.model.tp, length, pieces)
            if index is not None and rows.group.size > 1:
                index = rows.own_shard(index.repeat(batch))
            if begun is None:
                x = F.linear(rows.own_shard(latent.flatten(0, 1)), patchify.weight, patchify.bias)
            else:
                # Residuals are added to it in place.
                x = rows.own_shard(begun).clone()
            context = own.context.flatten(0, 1).contiguous()
        levels = None if index is None else TokenLevels(index)
        return FusedStream(
            names, x, context, own.rope, own.cross_rope, levels, tables, own.enabled, batch, rows, tokens
        )

    def _project_out(self, s: FusedStream, names: StreamNames) -> torch.Tensor:
        """The velocities (R, C_out) of this rank's rows."""
        proj_out = getattr(self.model, names.proj_out)
        shift, scale = s.tables.output[0].unbind(1)
        found = []
        for piece in range(s.rows.pieces):
            (h,) = self._blocks.normed(s, piece, [Modulation(shift, scale)], norm="layer")
            assert isinstance(h, torch.Tensor)
            with self._audio_stream.running(names):
                found.append(F.linear(h, proj_out.weight, proj_out.bias))
        with self._audio_stream.running(names):
            return found[0] if len(found) == 1 else torch.cat(found)


def _whole_velocities(s: FusedStream, own: torch.Tensor) -> torch.Tensor:
    """(B, T, C_out) from the velocities of this rank's rows."""
    by_entry = s.rows.gather(own).unflatten(0, (s.batch, -1))
    return by_entry if s.tokens is None else s.tokens.gather_tokens(by_entry)


def row_pieces(rows: int) -> int:
    """In how many pieces tensor-parallel ranks exchange so many rows."""
    return max(1, min(_MOST_PIECES, rows // _PIECE_ROWS))


def check_fp8(layer: PackedLinear, device_name: str) -> None:
    """Raise UnfitNode where PyTorch has no fp8 products with a scale for each row for the device of `layer`."""
    rows = torch.zeros((steps.MIN_FP8_ROWS, layer.weight.shape[1]), device=layer.weight.device)
    try:
        steps.linear(steps.QuantizedRows(rows.to(FP8), torch.ones_like(rows[:, :1])), layer)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UnfitNode(
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
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # The card's fault.
    except Exception as error:
        raise UnfitNode(
            f"the fused path needs Triton and a C compiler on every GPU node ({type(error).__name__}: {error}); "
            "legal: --compile off"
        ) from error
    return kernels
