"""What the version before the refactoring made is kept in tests/data/version_before; here is how it is made again.

Everything goes through the command line and through files, because the names of modules are what a refactoring
changes. `scripts/compare_versions.py` and `tests/data/version_before/make.py` run other checkouts with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "version_before"
DTYPES = ("bfloat16", "float32")
#: Manifests that are rendered. The first is for the toy's checkpoint, the other for a distilled one.
MANIFESTS = ("rows", "distilled")
#: Rows that name no LoRAs use both of these, at these strengths.
LORAS = {"style": "0.8", "camera": "0.5"}
#: Options of every run. Noise from a CPU is the same on every machine. One replica serves both stages, so that a run
#: starts three processes in place of four.
RENDERING = ("--noise-device", "cpu", "--device", "cpu", "--stage2-replicas", "0")
#: Every option that is a default of rows, each with a value that no pipeline has by itself.
ROW_DEFAULTS = {
    "negative-prompt": "grain, 雨", "seed": 21, "height": 128, "width": 192, "num-frames": 25, "frame-rate": 30.0,
    "num-inference-steps": 7, "video-cfg-guidance-scale": 2.5, "video-stg-guidance-scale": 0.25,
    "video-rescale-scale": 0.35, "a2v-guidance-scale": 1.75, "video-stg-blocks": "1,3", "video-skip-step": 2,
    "audio-cfg-guidance-scale": 5.5, "audio-stg-guidance-scale": 0.5, "audio-rescale-scale": 0.85,
    "v2a-guidance-scale": 2.25, "audio-stg-blocks": "0", "audio-skip-step": 1,
    "distilled-lora-strength-stage-1": 0.125, "distilled-lora-strength-stage-2": 0.625,
}  # fmt: skip
#: What is planned, by name: the manifest and its options. Rows of anonymous manifests have no id, so that the plan
#: shows the first 16 hex digits of their item_id. A sample's seed follows from the item_id, too.
PLANS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "rows-bfloat16": ("rows-anonymous.jsonl", ("--noise-device", "cpu")),
    "rows-float32": ("rows-anonymous.parquet", ("--noise-device", "cpu", "--dtype", "float32")),
    "rows-selected": ("rows.jsonl", ("--shard", "1/3", "--limit", "4", "--samples-per-prompt", "3")),
    "distilled-bfloat16": ("distilled-anonymous.jsonl", ("--noise-device", "cpu")),
    "distilled-float32": ("distilled-anonymous.jsonl", ("--noise-device", "cpu", "--dtype", "float32")),
    "defaults": ("planned.jsonl", ("--samples-per-prompt", "2")),
    "flags": (
        "planned.jsonl",
        (
            "--samples-per-prompt", "2", "--precision", "fp8",
            *(text for name, value in ROW_DEFAULTS.items() for text in (f"--{name}", str(value))),
        ),
    ),
}  # fmt: skip
#: The same options as those of the plan "flags", in a file.
CONFIG = {"samples-per-prompt": 2, "precision": "fp8", **ROW_DEFAULTS}

#: Columns of the index that do not depend on machines and moments.
KEPT_COLUMNS = (
    "id", "extra", "item_id", "clip", "audio_stage", "flags", "recipe_digest", "noise_ledger", "frame_rate", "pipeline",
)  # fmt: skip
#: Texts longer than this are kept by their start and digest: every row has the long default negative prompt.
_LONGEST_TEXT = 120
_MAIN = "from ltx_ray.cli import main; main()"
_FIND_TOY = "import json; from ltx_ray.toy import ensure_toy_model; print(json.dumps(ensure_toy_model()))"


class Version:
    """The command line of a checkout. Its commands run in `folder`, which gets a copy of the kept inputs.

    cache: where the version makes its toy model, so that a changed generator shows; by default the user's own.
    """

    def __init__(self, checkout: Path, folder: Path, cache: Path | None = None):
        self.checkout, self.folder = Path(checkout).resolve(), Path(folder).resolve()
        self.environment = {
            # Only this checkout: the environment's own installation may be of another one.
            **os.environ, "PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        self.environment.pop("RAY_ADDRESS", None)
        if cache is not None:
            self.environment["LTX_RAY_CACHE"] = str(cache)
        copy_inputs(self.folder)
        found = Path(self._python("import ltx_ray; print(ltx_ray.__file__)").strip())
        assert self.checkout in found.parents, f"{found} is imported, which is not in {self.checkout}"
        self.toy: dict[str, str] = json.loads(self._python(_FIND_TOY))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start an `ltx-ray` command. Its output goes to one pipe."""
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, codes: Iterable[int] = (0,), timeout: float = 600) -> str:
        """What an `ltx-ray` command prints. Fails when its exit code is none of `codes`."""
        return finish(self.start(*arguments), codes, timeout)

    def model(self, manifest: str) -> tuple[str, ...]:
        """The options that name the model and the LoRAs of a manifest.

        The model is the toy, or for rows of the distilled pipeline its files in the place of a distilled checkpoint's.
        Paths are absolute, because workers on a cluster have another current folder.
        """
        named = ((str(self.folder / f"{name}.safetensors"), strength) for name, strength in LORAS.items())
        loras = tuple(text for path, strength in named for text in ("--lora", path, strength))
        if not manifest.startswith("distilled"):
            return ("--model", "toy", *loras)
        names = ("gemma_root", "spatial_upsampler_path")
        files = {"distilled_checkpoint_path": self.toy["checkpoint_path"], **{name: self.toy[name] for name in names}}
        flags = tuple(text for name, path in files.items() for text in (f"--{name.replace('_', '-')}", path))
        return (*flags, *loras)

    def of_dataset(self) -> tuple[str, ...]:
        """The options of every run into the kept dataset."""
        return (*self.model("rows"), "--dtype", "float32", *RENDERING)

    def start_render(self, manifest: str, dtype: str, output: str, *more: str) -> subprocess.Popen[str]:
        """Start to render one of MANIFESTS."""
        self._first_scheme(output)
        where = (f"{manifest}.jsonl", "--output", output, "--dtype", dtype)
        return self.start("render", *where, *self.model(manifest), *RENDERING, "--save-latents", *more)

    def plan(self, name: str, options: Sequence[str] | None = None) -> list[Any]:
        """What `plan --resolved` says of one of PLANS, or of its manifest with other options.

        A legal row is the mapping that was printed, and any other line is text. An illegal row is kept up to the
        words on what is legal, which may be improved. What follows the rows is left out: it is an estimate of costs.
        """
        manifest, own = PLANS[name]
        own = own if options is None else tuple(options)
        self._first_scheme("planned")
        arguments = ("plan", manifest, "--output", "planned", "--all", "--resolved", *self.model(manifest), *own)
        said = self.run(*arguments, codes=(3,) if manifest.startswith("planned") else (0,))
        # The version before named a manifest as it was given.
        said = said.replace(f"{self.folder}/{manifest}:", f"{manifest}:")
        lines = said.replace(str(self.folder), "<folder>").partition("\nabout ")[0].split("\n")
        return [shortened(json.loads(line)) if line.startswith("{") else line.split(", legal:")[0] for line in lines]

    def _first_scheme(self, output: str) -> None:
        """Have a new output go by the scheme of item_ids that the version before had."""
        (self.folder / output).mkdir(parents=True, exist_ok=True)
        (self.folder / output / "dataset.json").write_text('{"format": 1, "scheme": 1}')

    def toy_digests(self) -> dict[str, str]:
        """sha256 of the toy model's files by name, 16 hex digits each."""
        folder = Path(self.toy["checkpoint_path"]).parent
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): _sha256(path.read_bytes()) for path in files}

    def _python(self, code: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, text=True, check=True, stdout=subprocess.PIPE
        ).stdout


def finish(process: subprocess.Popen[str], codes: Iterable[int] = (0,), timeout: float = 600) -> str:
    """What a command prints to its end. Fails when its exit code is none of `codes`."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()
        raise
    assert process.returncode in tuple(codes), f"{process.args[3:]} ended with {process.returncode}:\n{said}"
    return said


def finish_all(processes: Iterable[subprocess.Popen[str]], timeout: float = 600) -> None:
    """`finish` each of several commands that run at once. When one fails, the others are ended."""
    processes = tuple(processes)
    try:
        for process in processes:
            finish(process, timeout=timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.communicate()


def copy_inputs(folder: Path) -> None:
    """Put manifests, images and LoRAs into `folder`, and what follows from them: anonymous manifests, a config file."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.jsonl", "*.png", "style.safetensors", "camera.safetensors"):
        for path in DATA.glob(pattern):
            shutil.copy(path, folder)
    for manifest in MANIFESTS:
        rows = [{**row} for row in manifest_rows(manifest)]
        for row in rows:
            row.pop("id", None)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{manifest}-anonymous.jsonl").write_text(lines)
        pq.write_table(_table(rows), folder / f"{manifest}-anonymous.parquet")
    # JSON is YAML, too
    (folder / "config.yaml").write_text(json.dumps(CONFIG))


def manifest_rows(manifest: str) -> list[dict[str, Any]]:
    """The rows of one of MANIFESTS."""
    return [json.loads(line) for line in (DATA / f"{manifest}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def labels(manifest: str) -> list[str]:
    """A name for each row of a manifest, in its order: its id, or its number when it has none."""
    return [row.get("id", f"{manifest}-{number}") for number, row in enumerate(manifest_rows(manifest), start=1)]


def rows_of(output: Path, folder: str = "index") -> list[dict[str, Any]]:
    """All rows of a dataset's table: `index`, `failed` or `previews`."""
    return [row for part in sorted((output / folder).glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def by_label(manifest: str, index: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The index rows of one of MANIFESTS. Fails when one is missing, or when there is one more."""
    found = {row["id"]: row for row in index}
    assert len(found) == len(index), "a row appears twice"
    named = {}
    for label, row in zip(labels(manifest), manifest_rows(manifest)):
        default = next((one["id"] for one in index if one["prompt"] == row["prompt"]), None)
        named[label] = found.pop(row.get("id", default))
    assert not found, f"rows that the manifest has not: {sorted(found)}"
    return named


def kept_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an index row."""
    return {name: row[name] for name in KEPT_COLUMNS}


def latents_path(output: Path, item_id: str) -> Path:
    """Where a dataset stores the latents of an item."""
    return output / "latents" / item_id[:2] / f"{item_id}.safetensors"


def relative_distance(found: Any, expected: Any) -> float:
    """The L2 norm of the difference of two arrays, by that of the second one."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def machine() -> str:
    """What the bits of a computation depend on here: torch's build, the instructions that it uses, and the CPU."""
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "another CPU")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {model}"


def tolerance() -> float:
    """How far latents in float32 may be from the kept ones, as a relative L2.

    On a machine like the one that made them they should be the same bits. Between a CPU's instruction sets (SSE4,
    AVX2, AVX-512) the same code was up to 1.4e-5 apart.
    """
    return 1e-5 if machine() == kept("ids.json")["machine"][0] else 1e-4


def kept_latents(item_id: str) -> dict[str, np.ndarray]:
    """The latents of an item in float32: `stage_1.video`, `stage_1.audio`, `stage_2.video` and `stage_2.audio`."""
    with safe_open(DATA / "latents.safetensors", "np") as file:
        names = [name for name in file.keys() if name.startswith(f"{item_id}/")]  # noqa: SIM118
        return {name.partition("/")[2]: file.get_tensor(name) for name in names}


def distances(output: Path, item_id: str) -> dict[str, float]:
    """How far each of the four latents that a dataset stores of an item is from the kept one."""
    found, expected = load_file(latents_path(output, item_id)), kept_latents(item_id)
    assert sorted(found) == sorted(expected) and len(found) == 4
    return {name: relative_distance(found[name], expected[name]) for name in sorted(expected)}


def kept(name: str) -> Any:
    """A JSON file of the kept data."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def check_toy(version: Version) -> None:
    """Fails when the toy model's bytes are not those of the version before: no item_id could be the same then."""
    now, before = version.toy_digests(), kept("ids.json")["toy"]
    changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    assert not changed, (
        f"the toy model's bytes changed ({', '.join(changed)}), so that every item_id changes with them: "
        "either ltx_ray/toy draws other weights, or this torch build draws them differently"
    )


def shortened(value: Any) -> Any:
    """The value with long texts replaced by their start and their digest."""
    if isinstance(value, dict):
        return {name: shortened(inner) for name, inner in value.items()}
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[:40]}... ({len(value)} characters, sha256 {_sha256(value.encode())})"
    return value


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a Parquet table, with types as narrow and as wide as people's tools write them."""
    texts = ("prompt", "negative_prompt", "pipeline")
    integers = ("height", "width", "num_frames", "num_inference_steps", "video_skip_step", "audio_skip_step")
    image = [("path", pa.string()), ("frame_idx", pa.int64()), ("strength", pa.float64()), ("crf", pa.int64())]
    types = {
        **dict.fromkeys(texts, pa.string()), "seed": pa.int64(), **dict.fromkeys(integers, pa.int32()),
        **{f"{stream}_stg_blocks": pa.list_(pa.int64()) for stream in ("video", "audio")},
        "loras": pa.list_(pa.struct([("name", pa.string()), ("strength", pa.float64())])),
        "images": pa.list_(pa.struct(image)), "note": pa.large_string(), "take": pa.int8(),
    }  # fmt: skip
    scales = [name for row in rows for name in row if name.endswith("_scale") or "strength_stage" in name]
    types |= dict.fromkeys(sorted({*scales, "frame_rate"}), pa.float64())
    columns = {name: [row.get(name) for row in rows] for name in types}
    # a whole number may be written as a float in JSON
    for name in ("seed", *integers):
        columns[name] = [None if value is None else int(value) for value in columns[name]]
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
