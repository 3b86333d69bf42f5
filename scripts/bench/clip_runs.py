"""One run of ours and one command of the reference on the same files, split into the seconds of their parts.

scripts/bench_clip.py calls these for each number of layers, scripts/bench_line.py renders with several replicas.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PROMPTS = (
    "a woman walks slowly through the old market while the camera follows her in soft morning light",
    "an aerial view of the river and the forest in autumn with birds singing",
    "a city street at night with neon signs and cars passing quickly, the sound of rain in the background",
    "two children are running along the beach at sunset with waves and seagulls",
)
#: Stubs of packages that the reference imports but does not use here, for those that are not installed.
_STUBS = {
    "torchaudio.py": "import types\ntransforms = types.SimpleNamespace(MelSpectrogram=object, Resample=object)\n",
    "OpenImageIO.py": "",
    "scipy.py": "",
}
#: PyPI's fa3_fwd is FlashAttention-3 under another name.
_SHIM = "from fa3_fwd_interface import flash_attn_func\n"
#: On a CPU, the reference's CUDA synchronization and its autocast to float32 would fail.
_ON_CPU = """
import runpy, sys, torch
torch.set_num_threads(1)
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **kwargs: None
from ltx_core.model.audio_vae.vocoder import VocoderWithBWE
forward = VocoderWithBWE.forward
VocoderWithBWE.forward = lambda self, *args, **kwargs: forward(self.float(), *args, **kwargs)
runpy.run_module("ltx_pipelines.ti2vid_two_stages_hq", run_name="__main__", alter_sys=True)
"""
_RENDER = """
import json, sys
from ltx_ray.config import ModelFiles, RequestedNumerics, RunLimits
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options, render
spec = json.loads(sys.argv[1])
model, parallel = ModelFiles(**spec.pop("model")), ParallelConfig(**spec.pop("parallel"))
numerics = RequestedNumerics(**spec.pop("numerics"))
spec["command"] = tuple(spec["command"])
limits = RunLimits(max_attempts=1, start_timeout=300.0, call_timeout=300.0)
options = Options(model=model, numerics=numerics, parallel=parallel, limits=limits, **spec)
sys.exit(render(options))
"""


# --- ours --------------------------------------------------------------------------------------------------------


def ours(
    arguments: argparse.Namespace, files: dict[str, str], folder: Path, limit: float, precision: str
) -> dict[str, Any]:
    """Seconds of the parts of one run of ours; figures of a clip are means or medians over all clips."""
    # One GPU has one replica for both stages by default; a CPU would get one for each.
    parallel = {"stage2": 0} if arguments.device == "cpu" else {}
    spec = {"numerics": {"precision": precision, "device": arguments.device}, "parallel": parallel}
    run = render(arguments, files, folder / "ours", arguments.clips, limit, spec)
    figures = read_events(run.events, run.began, arguments.clips) | _index_seconds(run.out)
    figures["whole run"] = time.time() - run.began
    numerics = json.loads((run.out / "run.json").read_text())["numerics"]
    figures["numerics"] = {name: numerics.get(name) for name in ("attention", "precision", "compile")}
    return figures


class Rendered(NamedTuple):
    """A finished run: its output, its events, and when its command was given."""

    out: Path
    events: list[dict[str, Any]]
    began: float


def render(
    arguments: argparse.Namespace,
    files: dict[str, str],
    out: Path,
    clips: int,
    limit: float,
    spec: Mapping[str, Any],
    command: str = "bench_clip",
) -> Rendered:
    """Render `clips` rows into the new folder `out` in a process of its own, whose log is beside it.

    `spec` has the fields of `ltx_ray.run.Options` that are special to the run. Raises RuntimeError when a row fails or
    the run takes more than `limit` seconds.
    """
    height, width, frames = arguments.size
    manifest, log = out.with_name("manifest.jsonl"), out.with_name(f"{out.name}.log")
    shutil.rmtree(out, ignore_errors=True)
    rows = [{"id": f"clip-{i}", "prompt": _PROMPTS[i % len(_PROMPTS)], "seed": i} for i in range(clips)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "manifest": str(manifest), "output": str(out), "model": files, "command": [command], "row_defaults": {
            "height": height, "width": width, "num_frames": frames, "num_inference_steps": arguments.steps,
        }, **spec,
    }  # fmt: skip
    began = time.time()
    code = _run([sys.executable, "-c", _RENDER, json.dumps(spec)], _environment(arguments, [ROOT]), log, limit)
    if code != 0:
        raise RuntimeError(f"ours ended with {code}: {_tail(log)}\n{_failures(out)}")
    return Rendered(out, [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()], began)


def read_events(events: list[dict[str, Any]], began: float, clips: int) -> dict[str, Any]:
    """Figures from the events.jsonl of a run with one DiT replica whose command was given at `began`."""
    calls: dict[str, list[dict[str, Any]]] = {stage: [] for stage in ("text", "stage1", "stage2", "decode")}
    last: dict[str, dict[str, Any]] = {}
    switches = []
    for event in events:
        if event["event"] == "call":
            call = {**event, "end": event["start"] + event["seconds"], "work": event["seconds"]}
            calls[event["stage"]].append(call)
            last[event["replica"]] = call
        elif event["event"] == "switch":
            # The seconds of a call include the merging at its start, whose event follows that of the call.
            last[event["replica"]]["work"] -= event["seconds"]
            switches.append(event)
    for stage, made in calls.items():
        assert len(made) == clips, f"{len(made)} {stage} calls for {clips} clips"
        made.sort(key=lambda call: call["start"])
    first, dit = calls["stage1"][0], sorted(calls["stage1"] + calls["stage2"], key=lambda call: call["start"])
    ends = sorted(call["end"] for call in calls["decode"])
    steady = {stage: median(call["work"] for call in calls[stage]) for stage in ("text", "stage1", "decode")}
    alone, beside = split_by_overlap(calls["stage2"], calls["decode"])
    loaded = max(e["t"] for e in events if e["event"] == "gang_started" and e["replica"] == first["replica"])
    text = next(call["end"] for call in calls["text"] if call["item_id"] == first["item_id"])
    # One more than seen: in a longer run, each switch to stage 2 is followed by one back to stage 1.
    count = len(switches) + 1
    merging = mean(event["seconds"] for event in switches) * count if switches else 0.0
    work = {stage: sum(call["work"] for call in made) for stage, made in calls.items()}
    others = work["text"] + work["decode"] + merging
    parts = {
        "stage 1": steady["stage1"],
        "stage 2": alone,
        "slower beside decoding": max(0.0, beside - alone),
        "merging again, a clip": merging / clips,
        "idle, a clip": idle_seconds(calls, dit) / clips,
    }
    return {
        **parts,
        "clip, pipeline full": sum(parts.values()),
        **start_parts(events, began),
        "text": mean(call["work"] for call in calls["text"]),
        "decode": steady["decode"],
        "first_decode": calls["decode"][0]["work"],
        "first_decode / steady_decode": first_over_steady(calls["decode"]),
        "start": first["start"] - began,
        "cold": first["end"] - max(loaded, text) - steady["stage1"],
        "first to last clip, a clip": (ends[-1] - ends[0]) / (clips - 1) if clips > 1 else float("nan"),
        "command to last mp4": ends[-1] - began,
        "other calls' share": others / (others + work["stage1"] + work["stage2"]),
        "clips": clips,
        "switches": count,
        "clean weights": sorted({str(event.get("clean_weights")) for event in switches}),
    }


def start_parts(events: list[dict[str, Any]], began: float) -> dict[str, float]:
    """Seconds of the parts of a start, of which several pass at once.

    "ready" of a pool is the time from the command given at `began` to its first replica; the parts that follow are
    those that rank 0 measured. Those with "later" were done in the background or by the first call.
    """
    figures: dict[str, float] = {}
    for event in events:
        if event["event"] == "gang_started" and f"ready: {event['role']}" not in figures:
            role = event["role"]
            figures[f"ready: {role}"] = event["t"] - began
            figures[f"since it was asked for: {role}"] = event["seconds"]
            parts = event["ranks"][0].get("start_seconds") or {}
            figures |= {f"start of {role}: {part}": seconds for part, seconds in parts.items()}
        elif event["event"] == "start_finished":
            for part, seconds in event["seconds"].items():
                figures.setdefault(f"later, {event['role']}: {part}", seconds)
    return figures


def first_over_steady(calls: list[dict[str, Any]]) -> float:
    """Seconds of the first of the `calls` over the median of the others; nan when it is the only one."""
    first, *others = sorted(calls, key=lambda call: call["start"])
    return first["work"] / median(call["work"] for call in others) if others else float("nan")


def split_by_overlap(calls: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[float, float]:
    """Median seconds of the `calls` that overlap none of `others`, and of those that do.

    When there are no calls of a kind, the median is over all. The first stage-2 call of a run never overlaps decoding.
    """
    alone: list[float] = []
    overlapping: list[float] = []
    for call in calls:
        overlaps = any(other["start"] < call["end"] and other["end"] > call["start"] for other in others)
        (overlapping if overlaps else alone).append(call["work"])
    every = [call["work"] for call in calls]
    return median(alone or every), median(overlapping or every)


def idle_seconds(calls: Mapping[str, list[dict[str, Any]]], dit: list[dict[str, Any]]) -> float:
    """Seconds between calls of the DiT's replica during which a clip waited for either stage."""
    waiting = []
    for before, after in (("text", "stage1"), ("stage1", "stage2")):
        ready = {call["item_id"]: call["end"] for call in calls[before]}
        waiting += [(ready[call["item_id"]], call["start"]) for call in calls[after]]
    idle = 0.0
    for call, following in itertools.pairwise(dit):
        # Calls start only at the end of a gap, so a clip that waits in a gap waits at least until its end.
        since = [max(begin, call["end"]) for begin, end in waiting if end >= following["start"] > begin]
        idle += max(0.0, following["start"] - min(since)) if since else 0.0
    return idle


def _index_seconds(out: Path) -> dict[str, float]:
    """Means of the index's columns of seconds, which include merging."""
    import pyarrow.parquet as parquet

    rows = [row for part in glob.glob(f"{out}/index/part-*.parquet") for row in parquet.read_table(part).to_pylist()]
    names = ("text_seconds", "stage1_seconds", "stage2_seconds", "decode_seconds", "gpu_seconds")
    return {f"index: {name}": mean(row[name] for row in rows) for name in names}


def _failures(out: Path) -> str:
    import pyarrow.parquet as parquet

    rows = [row for part in glob.glob(f"{out}/failed/part-*.parquet") for row in parquet.read_table(part).to_pylist()]
    return "\n".join(f"{row['stage']}: {row['message']}\n{row['traceback'][-2000:]}" for row in rows[:1])


# --- the reference -----------------------------------------------------------------------------------------------


def reference(arguments: argparse.Namespace, files: dict[str, str], folder: Path, limit: float) -> dict[str, Any]:
    """Seconds of the parts of one command of the reference, taken from its log."""
    shims = folder / "shims"
    shims.mkdir(exist_ok=True)
    (shims / "flash_attn_interface.py").write_text(_SHIM)
    for name, text in _STUBS.items():
        if importlib.util.find_spec(name.removesuffix(".py")) is None:
            (shims / name).write_text(text)
    (shims / "ref_on_cpu.py").write_text(_ON_CPU)
    sources = [arguments.reference / "packages" / name / "src" for name in ("ltx-core", "ltx-pipelines")]
    height, width, frames = arguments.size
    module = "ref_on_cpu" if arguments.device == "cpu" else "ltx_pipelines.ti2vid_two_stages_hq"
    command = [
        sys.executable, "-m", module, "--prompt", _PROMPTS[0], "--output-path", str(folder / "reference.mp4"),
        "--checkpoint-path", files["checkpoint_path"], "--gemma-root", files["gemma_root"],
        "--distilled-lora", files["distilled_lora"], "--spatial-upsampler-path", files["spatial_upsampler_path"],
        "--height", str(height), "--width", str(width), "--num-frames", str(frames),
        "--num-inference-steps", str(arguments.steps), "--seed", "0",
    ]  # fmt: skip
    log = folder / "reference.log"
    extra = [*sources, arguments.reference / "site", shims]
    began, lines, code = time.time(), [], 1
    try:
        for when, line in _lines(command, _environment(arguments, extra), log, limit):
            lines.append((when - began, line))
            if line.startswith("ended: "):
                code = int(line.split()[1])
    finally:
        (folder / "reference.mp4").unlink(missing_ok=True)
    if code != 0:
        raise RuntimeError(f"the reference ended with {code}: {_tail(log)}")
    return read_log(lines)


def read_log(lines: list[tuple[float, str]]) -> dict[str, Any]:
    """Seconds of the parts of a command, from its log as (seconds since the command, line), "ended: CODE" last."""
    marks = (
        ("import and set-up", "Building text encoder"),
        ("text", "Prompt encoding complete"),
        ("other", "Building transformer (standard)"),
        ("load for stage 1", "it/s]"),
        ("stage 1", "Building video encoder + spatial upsampler"),
        ("upsampler", "Building transformer (standard)"),
        ("load for stage 2", "it/s]"),
        ("stage 2", "Building video decoder"),
        ("decode", "Video saved"),
        ("exit", "ended: "),
    )
    figures: dict[str, Any] = {}
    left, since = list(marks), 0.0
    for when, line in lines:
        # A progress bar is first drawn before the first step, with "?it/s" for its rate.
        if left and left[0][1] in line.replace("?it/s", "it/s"):
            figures[left.pop(0)[0]] = when - since
            since = when
    assert not left, f"the reference's log has no {left[0][1]!r}"
    figures["clip, its command"] = lines[-1][0]
    figures["attention"] = next((line.split("self: ")[1] for _, line in lines if "attention backends" in line), "?")
    return figures


# --- processes ---------------------------------------------------------------------------------------------------


def _environment(arguments: argparse.Namespace, path: list[Path]) -> dict[str, str]:
    """The environment of a run. Kernel caches are the benchmark's own, so that its first start is a cold one."""
    caches = arguments.folder / "caches"
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    known = [entry for entry in inherited.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return inherited | {
        "PYTHONPATH": os.pathsep.join([*known, *map(str, path)]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "LTX_RAY_CACHE": str(caches / "ltx-ray"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        **({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}),
    }


def _run(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int:
    code = 1
    for _, line in _lines(command, environment, log, limit):
        if line.startswith("ended: "):
            code = int(line.split()[1])
    return code


def _lines(command: list[str], environment: dict[str, str], log: Path, limit: float) -> Iterator[tuple[float, str]]:
    """(time, line) of a command's output and progress bars, then "ended: CODE". Kills it after `limit` seconds."""
    deadline, rest = time.monotonic() + limit, b""
    code: int | None = None
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    try:
        with log.open("wb") as file:
            while code is None:
                code = 124 if time.monotonic() > deadline else process.poll()
                data, when = process.stdout.read() or b"", time.time()
                file.write(data)
                *whole, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
                # A progress bar that is still being drawn has no line end yet.
                yield from ((when, text.decode(errors="replace")) for text in (*whole, rest) if text and data)
                if not data and code is None:
                    time.sleep(0.02)
        yield time.time(), f"ended: {code}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").replace("\r", "\n")[-3000:]
