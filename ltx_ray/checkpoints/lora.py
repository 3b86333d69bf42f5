"""LoRA files, read by their headers: which layers they change, in which format, with which alpha. No torch.

Three formats are read, and a file may mix them: the official one (`diffusion_model.<module>.lora_A.weight`, no alpha),
that of diffusers and PEFT (prefix `transformer.` or `base_model.model.`, diffusers' module names, alpha in the file's
metadata or in an adapter_config.json beside it), and ComfyUI's (`.lora_down.weight`, `.lora_up.weight`, an `.alpha` for
each module; also with the prefix `lora_unet_` and underscores for dots, as kohya's tools write them). Without an alpha
the scale is 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.checkpoints.diffusers_names import to_diffusers, to_official
from ltx_ray.checkpoints.digests import cached_digest
from ltx_ray.checkpoints.model_paths import is_file, open_binary
from ltx_ray.checkpoints.safetensors import SafetensorsHeader, TensorInfo, read_header
from ltx_ray.checkpoints.values import first_not_finite
from ltx_ray.config import NEWEST_SCHEME
from ltx_ray.storage.locations import join, parent, split_options

_SIDES = {
    "lora_A": "a", "lora_down": "a", "lora.down": "a", "lora_linear_layer.down": "a",
    "lora_B": "b", "lora_up": "b", "lora.up": "b", "lora_linear_layer.up": "b",
}  # fmt: skip
_FACTOR = re.compile(
    r"(?P<stem>.+)\.(?P<side>lora_[AB]|lora_down|lora_up|lora\.(?:down|up)|lora_linear_layer\.(?:down|up))"
    r"(?:\.(?P<adapter>\w+))??\.(?P<what>weight|weight_scale|scale_weight)"
)
#: Adapters other than a plain low-rank sum, by a part of their keys.
_OTHER_METHODS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "lora_mid": "LoCon",
    "oft_": "OFT", "boft_": "BOFT", "glora": "GLoRA",
}  # fmt: skip
_WHOLE_CHANGES = (".diff", ".diff_b", ".set_weight", ".lora_B.bias", ".lora_up.bias", ".reshape_weight")
_PEFT = "base_model.model."
_PREFIXES = (_PEFT, "model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_diffusion_model_", "lycoris_")
#: Parts whose modules are left out, by words in their names.
_LEFT_OUT = {
    "embeddings_connector": "the text connectors", "connectors.": "the text connectors",
    "embedding_projection": "the text projection", "aggregate_embed": "the text projection",
    "text_encoder": "a text encoder", "lora_te": "a text encoder", "language_model": "a text encoder",
    "vocoder": "the vocoder", "vae": "a VAE",
}  # fmt: skip
#: Metadata of LoRAs that were trained with a reference video or sound beside the prompt, as Lightricks' trainer writes
#: it; others write the same with `ss_` before it.
_REFERENCE_KEYS = (
    "reference_downscale_factor", "reference_spatial_scale_factor", "reference_temporal_scale_factor",
    "ic_lora_strategy", "v2v_training", "av_ic_training", "hdr_transform", "use_hdr_transform",
)  # fmt: skip
_UNSET = ("", "none", "null", "false")
#: The factors of a larger file are checked when they are merged: reading them here would take too long.
_CHECKED_BYTES = 2**30
_PLAIN = ("BF16", "F16", "F32", "F64")
_QUANTIZED = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True)
class Factor:
    """One factor of a LoRA, and its scale when it is quantized: one number, or one for each row."""

    tensor: TensorInfo
    scale: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


@dataclass(frozen=True)
class LoraPair:
    """A LoRA of one layer (out, in): it adds strength * `scale` * b (out, rank) @ a (rank, in) to the weight.

    `scale` is alpha / rank, or 1 without an alpha (Hu et al., LoRA, arXiv:2106.09685, section 4.1).
    """

    a: Factor
    b: Factor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: its pairs of factors, by module name as the file spells it."""

    header: SafetensorsHeader
    pairs: Mapping[str, LoraPair]

    @property
    def path(self) -> str:
        return self.header.path

    def fit(self, linears: Mapping[str, tuple[int, int]], model: str) -> dict[str, LoraPair]:
        """The pairs by official module name. `linears` maps the modules of the file `model` to (out, in).

        Modules that the transformer does not have are left out, as the reference does: a LoRA may hold some for the
        connectors or a text encoder. Raises ValueError when none is left, or a shape does not fit.
        """
        flat = _flat(linears)
        fitting: dict[str, LoraPair] = {}
        for stem, pair in self.pairs.items():
            module = _official(stem, linears, flat)
            if module is None:
                continue
            out_features, in_features = linears[module]
            a, b = pair.a.shape, pair.b.shape
            if len(a) != 2 or a[1] != in_features or b != (out_features, a[0]):
                raise ValueError(
                    f"{self.path}: {stem} has factors A {a} and B {b}, but that layer of {model} is "
                    f"{out_features} x {in_features}; legal: A (rank, {in_features}) and B ({out_features}, rank)"
                )
            if module in fitting:
                raise ValueError(f"{self.path}: {module} appears twice, the second time as {stem}; legal: once")
            fitting[module] = pair
        if not fitting:
            raise ValueError(
                f"{self.path}: fits no layer of {model}; it has {len(self.pairs)} modules such as "
                f"{next(iter(self.pairs))!r}"
            )
        return fitting


def open_lora(path: str) -> LoraFile:
    """Open a LoRA file. Raises ValueError naming file and key when it is not a LoRA or cannot be merged."""
    header = read_header(path)
    _refuse_reference(header)
    found: dict[str, dict[str, TensorInfo]] = {}
    understood: set[str] = set()
    for name, info in header.tensors.items():
        if method := next((method for part, method in _OTHER_METHODS.items() if part in name), None):
            raise ValueError(f"{path}: {name} belongs to a {method}, which cannot be merged here; legal: a plain LoRA")
        if name.endswith(_WHOLE_CHANGES):
            raise ValueError(f"{path}: {name} changes a weight or bias as a whole; legal: low-rank factors only")
        if name.endswith(".alpha"):
            found.setdefault(name[: -len(".alpha")], {})["alpha"] = info
            understood.add(name)
        elif match := _FACTOR.fullmatch(name):
            side = _SIDES[match["side"]] + ("" if match["what"] == "weight" else "_scale")
            entry = found.setdefault(match["stem"], {})
            if side in entry:
                raise ValueError(f"{path}: {name} is a second factor of {match['stem']}; legal: one adapter per file")
            entry[side] = info
            understood.add(name)
    alphas = _Alphas(header)
    pairs = {}
    for stem, entry in found.items():
        if entry.keys() == {"alpha"}:
            continue  # the vocoder has parameters called alpha
        if "a" not in entry or "b" not in entry:
            there = next(iter(entry.values())).key
            missing = "A (lora_A, lora_down)" if "a" not in entry else "B (lora_B, lora_up)"
            raise ValueError(f"{path}: {there} has no factor {missing} beside it; legal: both factors of every module")
        a, b = Factor(entry["a"], entry.get("a_scale")), Factor(entry["b"], entry.get("b_scale"))
        for factor in (a, b):
            _check_kind(factor)
        alpha = entry["alpha"].scalar() if "alpha" in entry else alphas.of(stem)
        rank = a.shape[0] if a.shape else 0
        if not rank or (alpha is not None and not math.isfinite(alpha)):
            raise ValueError(f"{path}: {stem} has rank {rank} and alpha {alpha}; legal: rank ≥ 1, a finite alpha")
        scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if alphas.by_root else rank)
        pairs[stem] = LoraPair(a, b, scale)
    strange = [name for name in header.tensors if name not in understood and _belongs(name, pairs)]
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} keys beside the factors are not understood ({', '.join(sorted(strange)[:10])}); "
            f"legal: the factors, their weight_scale, and alpha"
        )
    if not pairs:
        raise ValueError(f"{path}: holds no LoRA; legal: keys <module>.lora_A.weight and <module>.lora_B.weight")
    return LoraFile(header, pairs)


def _refuse_reference(header: SafetensorsHeader) -> None:
    """Raise ValueError for an IC-LoRA: without its reference, a clip would be something that nobody asked for."""
    for key, value in _settings(header.metadata):
        bare = key.lower().strip().rpartition(".")[2].removeprefix("ss_")
        if bare in _REFERENCE_KEYS and value.lower().strip() not in _UNSET:
            raise ValueError(
                f"{header.path}: wants a reference video, which no row can give (its metadata has {key} {value}); "
                f"legal: a LoRA that works from prompts and images"
            )


def _settings(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The metadata's fields, and those of the JSON objects in them, such as a trainer's configuration.

    A configuration holds defaults too: a scale of 1 in it says nothing.
    """
    for key, value in metadata.items():
        yield key, str(value)
    inner: list[Any] = []
    for text in map(str, metadata.values()):
        if text.lstrip().startswith("{"):
            try:
                inner.append(json.loads(text))
            except (ValueError, RecursionError):
                continue
    while inner:
        table = inner.pop()
        if isinstance(table, dict):
            inner += table.values()
            said = ((key, value) for key, value in table.items() if value is True or value not in (0, 1, {}, []))
            yield from ((key, str(value)) for key, value in said)
        elif isinstance(table, list):
            inner += table


def lora_digest(path: str, scheme: int = NEWEST_SCHEME) -> str:
    """32 hex digits for the LoRA at `path` and the configuration beside it, whose alpha decides pixels."""
    digest, beside = cached_digest(path, scheme=scheme), config_beside(read_header(path))
    if beside is None:
        return digest
    return hashlib.sha256((digest + cached_digest(beside, scheme=scheme)).encode()).hexdigest()[:32]


def _belongs(name: str, stems: Mapping[str, object]) -> bool:
    """Whether `name` is a key of one of the modules `stems`."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in stems:
            return True
    return False


def config_beside(header: SafetensorsHeader) -> str | None:
    """The adapter_config.json beside an adapter that PEFT wrote, which is recognized by its name or keys."""
    peft = any(key.startswith(_PEFT) for key in header.tensors)
    named = os.path.basename(split_options(header.path)[0]) == "adapter_model.safetensors"
    beside = join(parent(header.path), "adapter_config.json")
    return beside if (peft or named) and is_file(beside) else None


class _Alphas:
    """Alphas of PEFT's configuration, in the file's metadata or in the file beside it."""

    def __init__(self, header: SafetensorsHeader):
        self._path = header.path
        self._configs = dict(_configs(header))
        for prefix, config in self._configs.items():
            if config.get("use_dora"):
                raise ValueError(f"{self._path}: {prefix or 'the adapter'} is a DoRA; legal: a plain LoRA")
        #: The transformer's configuration, which applies to its modules in any spelling.
        self._config = self._configs.get("transformer.", self._configs.get(""))
        #: Rank-stabilised LoRA divides alpha by the square root of the rank (arXiv:2312.03732).
        self.by_root = bool(self._config and self._config.get("use_rslora"))

    def of(self, stem: str) -> float | None:
        others = [prefix for prefix in self._configs if prefix not in ("", "transformer.")]
        if any(stem.startswith(prefix) for prefix in others):
            return None  # a module of another component, such as a text encoder, which is left out
        config = self._config
        if config is None:
            return None
        module = _bare(stem)
        try:
            for pattern, alpha in (config.get("alpha_pattern") or {}).items():
                if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in (module, to_diffusers(module))):
                    return float(alpha)
            alpha = config.get("lora_alpha")
            return None if alpha is None else float(alpha)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"{self._path}: its configuration says no alpha of {stem} ({error}); legal: lora_alpha, a number, and "
                f"alpha_pattern, numbers by patterns of names"
            ) from None


def _bare(stem: str) -> str:
    """A module's name without the prefixes that tools add."""
    while prefix := next((p for p in _PREFIXES if stem.startswith(p)), None):
        stem = stem[len(prefix) :]
    return stem


def _configs(header: SafetensorsHeader) -> Iterator[tuple[str, dict[str, Any]]]:
    """PEFT configurations, each with the prefix of the keys that it applies to."""
    if text := header.metadata.get("lora_adapter_metadata"):
        table = _json(header.path, "metadata field 'lora_adapter_metadata'", text)
        # diffusers writes the configurations of all components into one table: "transformer.lora_alpha"
        prefixes = {key.split(".")[0] + "." for key in table if key.endswith(".lora_alpha")} or {""}
        for prefix in sorted(prefixes):
            yield prefix, {key[len(prefix) :]: value for key, value in table.items() if key.startswith(prefix)}
    elif beside := config_beside(header):
        try:
            with open_binary(beside) as file:
                text = file.read().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{beside}: cannot be read ({error})") from None
        yield "", _json(beside, "it", text)


def _json(path: str, what: str, text: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {what} is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {what} is not a JSON object")
    return table


def _check_kind(factor: Factor) -> None:
    info, scale = factor.tensor, factor.scale
    if info.dtype not in _PLAIN + _QUANTIZED or (info.dtype == "I8" and scale is None):
        raise ValueError(
            f"{info.path}: {info.key} is {info.dtype}{'' if scale else ' without a scale'}; "
            f"legal: {', '.join(_PLAIN)}, {', '.join(_QUANTIZED[:2])}, or I8 with a weight_scale"
        )
    rows = info.shape[0] if info.shape else 1
    if scale is not None and (scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or scale.dtype not in _PLAIN):
        raise ValueError(
            f"{scale.path}: {scale.key} is {scale.dtype} {scale.shape}; legal: one number, or one for each of "
            f"{rows} rows, as {', '.join(_PLAIN)}"
        )


def _flat(linears: Iterable[str]) -> dict[str, str]:
    """Official module names by their spelling with underscores for dots, official or diffusers'."""
    return {spelled.replace(".", "_"): name for name in linears for spelled in (to_diffusers(name), name)}


def _official(stem: str, linears: Mapping[str, object], flat: Mapping[str, str]) -> str | None:
    name = stem
    while True:
        if name in linears:
            return name
        if (renamed := to_official(name)) in linears:
            return renamed
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            break
        name = name[len(prefix) :]
    for prefix in _FLAT_PREFIXES:
        if stem.startswith(prefix):
            words = stem[len(prefix) :]
            return flat.get(words)
    return None


def check_lora(checkpoint: Checkpoint, path: str) -> str | None:
    """A warning when the LoRA at `path` has modules that the transformer lacks; None otherwise.

    Raises ValueError when it fits no layer, cannot be merged, or holds values that are not finite. Values of a file of
    more than 1 GiB are left to the first merge.
    """
    lora, linears = open_lora(path), checkpoint.linear_layers
    fitting = lora.fit(linears, checkpoint.path)
    if lora.header.size <= _CHECKED_BYTES:
        factors = (factor for pair in fitting.values() for factor in (pair.a, pair.b))
        tensors = (info for factor in factors for info in (factor.tensor, factor.scale) if info is not None)
        if (bad := first_not_finite(tensors)) is not None:
            raise not_finite(bad)
    flat = _flat(linears)
    others = {name.rpartition(".")[0] or name for name in lora.header.tensors if not _belongs(name, lora.pairs)}
    left = [stem for stem in (*lora.pairs, *sorted(others)) if _official(stem, linears, flat) is None]
    if not left:
        return None
    parts = Counter(next((part for word, part in _LEFT_OUT.items() if word in stem), "other parts") for stem in left)
    shown = ", ".join(f"{count} of {part}" for part, count in parts.most_common())
    return (
        f"{path}: changes {len(fitting)} layers; {len(left)} of its modules are not in {checkpoint.path} and are left "
        f"out, as the reference leaves them, such as {left[0]} ({shown})"
    )


def not_finite(info: TensorInfo) -> ValueError:
    """What to raise for a factor, or for its scale, that holds NaN or infinity."""
    return ValueError(
        f"{info.path}: {info.key} is not finite (it holds NaN or infinity); legal: factors of finite numbers"
    )
