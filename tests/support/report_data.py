"""A synthetic dataset for tests of the report: small real mp4s, index and failed parts, run.json, events.jsonl.

Run as a program, it writes a dataset whose report can be looked at:
python tests/support/report_data.py OUT [full|empty|failures|shared|many]
"""

from __future__ import annotations

import colorsys
import json
import random
import sys
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.dataset import layout
from ltx_ray.dataset.quality import MEASURES

T0 = datetime(2026, 5, 12, 21, 4, 7, tzinfo=UTC)
#: Text that would break out of HTML, attributes, scripts or the template if it were not escaped.
HOSTILE = '</script><img src=x onerror=alert(1)><script>alert(2)</script>"\' onmouseover="alert(3) {{title}} \x00 &amp;'
PROMPTS = (
    "A lighthouse on a basalt cliff at dusk; waves break below, gulls call, the lamp sweeps left.",
    "一只橘猫坐在窗台上看雨，雨滴顺着玻璃滑落，远处传来低沉的雷声。镜头缓慢推近。",
    "عاصفة رملية تقترب من واحة صغيرة عند الغروب، وصوت الريح يعلو شيئا فشيئا بين أشجار النخيل.",
    "A street drummer 🥁 under a railway bridge, neon reflections 🌃 in the puddles, trains overhead.",
    HOSTILE,
    "The camera glides through a glasshouse in early morning light. Water runs down the panes, "
    "ferns unfold in time-lapse, a gardener in a green apron walks past and hums a tune. " * 4,
    "दीवाली की रात, छत पर दीये जलते हैं और दूर आतिशबाज़ी की आवाज़ आती है।",
    "Macro shot: ink drops bloom in water.\n\nNo music, only a soft low hum.",
)
_TYPES = {
    "seed": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "num_frames": pa.int32(),
    "frame_rate": pa.float64(),
    **{name: layout.INDEX_SCHEMA.field(name).type for name in MEASURES},
    "num_inference_steps": pa.int32(),
    "video_cfg_scale": pa.float64(),
    "attempts": pa.int32(),
    "switches": pa.int32(),
    "flags": pa.list_(pa.string()),
    "finished_at": pa.timestamp("us", tz="UTC"),
    "images": pa.list_(
        pa.struct(
            [
                ("path", pa.string()),
                ("frame_idx", pa.int32()),
                ("strength", pa.float64()),
                ("crf", pa.int32()),
            ]
        )
    ),
    "loras": pa.list_(pa.struct([("name", pa.string()), ("strength", pa.float64())])),
    **{f"{s}_seconds": pa.float64() for s in ("text", "stage1", "stage2", "decode", "gpu")},
}


def write_mp4(path: Path, width: int, height: int, frames: int, rate: float = 24.0, seed: int = 0) -> None:
    """Write a clip (H.264 and AAC) of a sun that crosses a coloured sky, with a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fraction = Fraction(rate).limit_denominator(1001)
    hue = (seed * 0.381966) % 1
    top, low, sun = (
        np.array(colorsys.hsv_to_rgb((hue + d) % 1, s, v))
        for d, s, v in ((0, 0.6, 0.3), (0.08, 0.5, 0.8), (0.12, 0.2, 1))
    )
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    sky = top + (low - top) * (ys / height)[..., None]
    hills = ys > height * (0.78 + 0.06 * np.sin(xs / width * 9 + seed) + 0.03 * np.sin(xs / width * 23))
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fraction, options={"crf": "23", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = out.add_stream("aac", rate=48000, layout="stereo")
        for i in range(frames):
            u = i / max(1, frames - 1)
            cx, cy = width * (0.1 + 0.8 * u), height * (0.72 - 1.9 * u * (1 - u))
            glow = np.clip(1.4 - np.hypot(xs - cx, ys - cy) / (0.11 * min(width, height)), 0, 1)[..., None]
            picture = sky + (sun - sky) * glow
            picture = np.where(hills[..., None], picture * 0.25, picture)
            frame = av.VideoFrame.from_ndarray((picture * 255).astype(np.uint8), format="rgb24")
            out.mux(video.encode(frame))
        out.mux(video.encode())
        n = int(48000 * frames / rate)
        tone = (0.2 * np.sin(2 * np.pi * 220 * np.arange(n) / 48000)).astype(np.float32)
        for start in range(0, n, 1024):
            block = av.AudioFrame.from_ndarray(
                np.stack([tone[start : start + 1024]] * 2), format="fltp", layout="stereo"
            )
            block.sample_rate, block.pts = 48000, start
            out.mux(audio.encode(block))
        out.mux(audio.encode())


def index_row(i: int, width: int = 64, height: int = 64, frames: int = 9, rate: float = 24.0, **changes) -> dict:
    item = f"{i * 2654435761 % 2**32:08x}" * 4
    rng = random.Random(i)
    megapixels = width * height * frames / 1e6
    row = dict(
        id=f"clip-{i:04d}",
        prompt=PROMPTS[i % len(PROMPTS)],
        negative_prompt="worst quality, distorted",
        seed=10 + i,
        height=height,
        width=width,
        num_frames=frames,
        frame_rate=rate,
        num_inference_steps=15,
        video_cfg_scale=3.0,
        pipeline="hq",
        images=[],
        loras=[],
        extra=None,
        item_id=item,
        clip=f"clips/{item[:2]}/{item}.mp4",
        clip_sha256="c" * 64,
        latents_sha256="a" * 64,
        flags=[],
        attempts=1,
        stage1_replica=f"stage1-{i % 3}",
        stage2_replica=f"stage2-{i % 2}",
        switches=0,
        motion=0.1 + 0.05 * (i % 4),
        text_seconds=0.2 + 0.2 * rng.random(),
        stage1_seconds=1 + megapixels * 0.9,
        stage2_seconds=1 + megapixels * 0.5,
        decode_seconds=0.4 + megapixels * 0.2,
        gpu_seconds=3 + megapixels * 1.6,
        device="NVIDIA H100 80GB HBM3",
        recipe_digest="9f2c41d07be3a855",
        versions='{"ltx_ray": "0.1.0", "torch": "2.11.0"}',
        finished_at=T0 + timedelta(seconds=60 + 3 * i),
    )
    return row | changes


def failed_row(i: int, **changes) -> dict:
    row = dict(
        id=f"bad-{i:03d}",
        prompt=PROMPTS[i % len(PROMPTS)],
        item_id=f"{i:030x}ff",
        stage="stage2",
        attempts=3,
        error_class="infrastructure",
        message="replica stage2-1 died: CUDA error: an illegal memory access was encountered",
        traceback='Traceback (most recent call last):\n  File "ltx_ray/pools/worker.py", line 88, in call\n'
        "    return engine(item)\nRuntimeError: CUDA error: an illegal memory access was encountered\n",
        source=f"prompts.parquet:{i}",
    )
    return row | changes


def write_parts(out: Path, folder: str, rows: list[dict], size: int = 8) -> None:
    (out / folder).mkdir(parents=True, exist_ok=True)
    for k in range(0, len(rows), size):
        part = rows[k : k + size]
        columns = {
            c: pa.array([r[c] for r in part], type=_TYPES.get(c, pa.string()))
            for c in part[0]
            if c not in ("attempts",)
        }
        columns["attempts"] = pa.array([r["attempts"] for r in part], type=pa.int32())
        pq.write_table(pa.table(columns), out / folder / f"part-{k:08d}.parquet")


def write_events(out: Path, events: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def run_events(
    calls: int = 60, shared: bool = False, replicas: tuple[int, int, int, int] = (1, 3, 2, 1), seed: int = 1
) -> list[dict]:
    """Events of a plausible run: gangs load, items pass the stages, and one gang is lost and started again."""
    rng = random.Random(seed)
    base = T0.timestamp()
    events = [{"t": base, "event": "run_started", "run_id": "r-20260512-210407"}]
    free_at: dict[tuple[str, str], float] = {}
    stages = ("text", "stage1", "stage2", "decode")
    cost = dict(text=0.5, stage1=11.0, stage2=8.0, decode=2.2)
    for stage, number in zip(stages, replicas):
        if shared and stage == "stage2":
            continue
        role = "diffusion" if shared and stage == "stage1" else stage
        load = dict(text=9, decode=6).get(stage, 24)
        for k in range(number):
            name, ready = f"{role}-{k}", base + 1 + load * (0.9 + 0.3 * rng.random())
            events.append({"t": base + 1, "event": "gang_starting", "role": role, "replica": name})
            ranks = [{"rank": 0, "pid": 100 + k, "node": f"node-{k}", "device": "cuda:0"}]
            events.append(
                {
                    "t": ready,
                    "event": "gang_started",
                    "role": role,
                    "replica": name,
                    "ranks": ranks,
                    "seconds": load,
                }
            )
            free_at[(role, name)] = ready
    merged: dict[str, str] = {}
    for i in range(calls // 4):
        t = base
        for stage in stages:
            role = "diffusion" if shared and stage in ("stage1", "stage2") else stage
            key = min((k for k in free_at if k[0] == role), key=lambda k: (free_at[k], rng.random()))
            start = max(t, free_at[key])
            if shared and role == "diffusion" and merged.get(key[1], "stage1") != stage:
                merged[key[1]] = stage
                start += 3.0
                events.append(
                    {
                        "t": start,
                        "event": "switch",
                        "role": role,
                        "replica": key[1],
                        "to": stage,
                        "seconds": 3.0,
                    }
                )
            seconds = cost[stage] * (0.7 + 0.7 * rng.random())
            ok = not (i % 17 == 9 and stage == "stage2")
            t = free_at[key] = start + seconds
            call = {
                "role": role,
                "replica": key[1],
                "stage": stage,
                "item_id": f"{i:032x}",
                "id": f"clip-{i:04d}",
            }
            events.append({"t": t, "event": "call", **call, "start": start, "seconds": seconds, "ok": ok})
            if not ok and i == 9:
                events.append(
                    {
                        "t": t,
                        "event": "gang_lost",
                        "role": role,
                        "replica": key[1],
                        "reason": "rank 0 died: CUDA error",
                    }
                )
                events.append({"t": t + 2, "event": "gang_starting", "role": role, "replica": key[1]})
                free_at[key] = t + 24
                events.append(
                    {
                        "t": t + 24,
                        "event": "gang_started",
                        "role": role,
                        "replica": key[1],
                        "ranks": [],
                        "seconds": 22,
                    }
                )
                events.append(
                    {
                        "t": t + 1,
                        "event": "item_failed",
                        "item_id": "0",
                        "id": "bad-000",
                        "stage": stage,
                        "message": "died",
                    }
                )
        events.append({"t": t, "event": "item_finished", "item_id": f"{i:032x}", "id": f"clip-{i:04d}"})
    end = max(e["t"] for e in events)
    return sorted(events, key=lambda e: e["t"]) + [{"t": end + 1, "event": "run_finished", "counts": {}}]


def write_run(out: Path, seconds: float = 300, state: str = "finished", **counts: int) -> None:
    run = {
        "run_id": "r-20260512-210407",
        "started_at": T0.isoformat(),
        "state": state,
        "finished_at": (T0 + timedelta(seconds=seconds)).isoformat(),
        "command": ["ltx-ray", "render", "prompts.parquet", "--output", "OUT"],
        "manifest": "prompts.parquet",
        "output": "OUT",
        "pools": {"text": 1, "stage1": 3, "stage2": 2, "decode": 1},
        "tp": 1,
        "numerics": {"attention": "sdpa-flash", "compile": "off"},
        "counts": counts,
        "cost": {"gpu_hours": 1.5, "dollars": 3.75, "dollars_per_clip": 0.05, "dollars_per_video_hour": 40.0},
        "recipe": {"pipeline": "hq", "dtype": "bfloat16", "checkpoint": "5b1e…"},
        "recipe_digest": "9f2c41d07be3a855",
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"ltx_ray": "0.1.0", "python": "3.11.7", "torch": "2.11.0", "ray": "2.49.0"},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(run))


def main(out: Path, kind: str = "full") -> None:
    failures = [
        failed_row(0),
        failed_row(
            1,
            stage="manifest",
            attempts=0,
            error_class="row",
            item_id=None,
            traceback=None,
            message="prompts.parquet:17:num_frames (bad-001): 100, must be 8k+1: 97 or 105",
        ),
        failed_row(4, stage="stage1", error_class="row", attempts=1, message=f"latents are not finite {HOSTILE}"),
    ]
    sizes = (
        (768, 512, 49, 24.0),
        (1280, 704, 33, 29.97),
        (512, 768, 41, 25.0),
        (576, 576, 25, 24.0),
        (1216, 512, 49, 23.976),
    )
    n = dict(empty=0, failures=0, many=300).get(kind, 17)
    if kind == "empty":
        write_run(out, 40, rows=0, rendered=0, failed=0)
        return
    write_parts(out, "failed", failures)
    if kind == "failures":
        write_run(out, 61, "failed", rows=3, rendered=0, failed=3, illegal=1)
        write_events(out, run_events(0)[:-1])
        return
    rows = []
    for i in range(n):
        size = sizes[i % len(sizes)]
        row = index_row(i, *size)
        write_mp4(out / row["clip"], *(max(64, s // 4 * 2) for s in size[:2]), *size[2:], seed=i)
        rows.append(row)
    rows[2]["flags"], rows[6]["flags"], rows[7]["flags"] = (
        ["silent"],
        ["prompt_truncated", "frozen"],
        ["black"],
    )
    rows[5]["loras"], rows[5]["attempts"] = [{"name": "anime", "strength": 0.8}], 2
    for i, damage in ((3, b"not an mp4"), (8, None), (9, 0.5)):
        path = out / rows[i]["clip"]
        data = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(
            damage if isinstance(damage, bytes) else data[: int(len(data) * damage)]
        )
    rows[10]["clip"] = None
    write_parts(out, "index", rows)
    events = run_events(
        max(68, 4 * n), shared=kind == "shared", replicas=(2, 8, 6, 3) if kind == "many" else (1, 3, 2, 1)
    )
    if kind == "many":
        events = run_events(10_000, replicas=(2, 8, 6, 3))
    write_events(out, events)
    write_run(out, events[-1]["t"] - events[0]["t"], rows=n + 3, rendered=n, failed=3, illegal=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
