"""The command line: each wrong input has its message and its exit code, and none of them starts Ray."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from PIL import Image

from ltx_ray import run
from ltx_ray.cli import app
from ltx_ray.cli.app import main
from ltx_ray.cli.options import MODEL_OPTIONS, model_files
from ltx_ray.config import LoraSpec, RunLimits
from ltx_ray.dataset.output import wait_seconds
from ltx_ray.dataset.writer import Failure
from ltx_ray.manifest.raw import RawRow
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.locations import resolve
from ltx_ray.storage.store import Store
from tests.support.checkpoint_files import BLOCK, REQUIRED, checkpoint
from tests.support.datasets import dataset_writer, finish
from tests.support.results import RENDERED
from tests.support.samples import request, write_jsonl, write_safetensors

SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
GOOD = {"prompt": "a cat", **SMALL}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    assert not ray.is_initialized()


@pytest.fixture
def cmd(capfd):
    """Runs the command line; returns exit code, stdout and stderr."""

    def call(*args) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return caught.value.code, out, err

    return call


@pytest.fixture
def manifest(tmp_path) -> str:
    return write_jsonl(tmp_path / "m.jsonl", [GOOD])


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "out")


@pytest.fixture
def options(monkeypatch):
    """The options with which `render` is called, in place of a run."""
    seen = []
    monkeypatch.setattr(app, "render", lambda options: seen.append(options) or 0)
    return seen


# --- wrong input: exit code 2 ----------------------------------------------------------------------


def usage(cmd, *args) -> str:
    """The one-line message of a usage error."""
    code, _, err = cmd(*args)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("command", ["render", "plan"])
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.jsonl", None, "no such manifest"),
        ("m.jsonl", '{"text": "a cat"}\n', "has no column 'prompt' (it has text)"),
        ("m.jsonl", '{"prompt": "a cat", "seed": "ten"}\n', "column 'seed' has type string"),
        ("m.jsonl", "a cat\n", "cannot be read as JSON lines"),
        ("m.parquet", "a cat\n", "cannot be read as Parquet"),
        ("m.csv", "prompt\na cat\n", "not a manifest"),
    ],
)
def test_a_manifest_that_is_refused(cmd, tmp_path, out, command, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    message = usage(cmd, command, path, "--output", out, "--model", "toy")
    assert str(path) in message and words in message
    assert not Path(out).exists()


def test_an_output_that_cannot_be_written(cmd, manifest, tmp_path):
    (tmp_path / "file").write_text("")
    message = usage(cmd, "render", manifest, "--output", tmp_path / "file" / "out", "--model", "toy")
    assert f"--output: {tmp_path}/file/out, cannot be written" in message


def test_a_store_that_does_not_refuse_a_second_create(cmd, manifest, out, monkeypatch):
    monkeypatch.setattr(Store, "create", lambda store, path, data: store.write_bytes(path, data) or True)
    monkeypatch.setattr(Store, "refuses_second_create", lambda store: False)
    code, _, err = cmd("render", manifest, "--output", out, "--model", "toy")
    assert code == 2 and f"--output: {out}, whose store creates a file although there is one" in err
    monkeypatch.setattr(run.Run, "execute", lambda self, rows: 0)
    assert cmd("render", manifest, "--output", out, "--model", "toy", "--single-writer")[0] == 0


def test_gpu_hours_that_earlier_runs_have_used_up(cmd, manifest, out, monkeypatch):
    """The cluster is not joined, unless the limit leaves some."""

    def join(cluster):
        raise ConnectionError("joined")

    monkeypatch.setattr("ltx_ray.placement.cluster.Cluster.join", join)
    Store(out).write_bytes("state/gpu_time.json", b'{"epoch": 1, "gpu_seconds": 7200.0}')
    words = ("render", manifest, "--output", out, "--model", "toy")
    code, _, err = cmd(*words, "--max-gpu-hours", "2")
    told = (
        "error: --max-gpu-hours: 2, of which earlier runs into this output have reserved 2.00; legal: a larger number"
    )
    assert code == 2 and told in err and "joined" not in err
    code, _, err = cmd(*words, "--max-gpu-hours", "2.1")
    assert code == 1 and "joined" in err


@pytest.mark.parametrize(
    "more", [("--shard", "0/2"), ("--wait-for-output", "0"), ("--shard", "0/2", "--wait-for-output", "0.1")]
)
def test_an_output_in_which_another_run_is_at_work(cmd, manifest, out, more):
    other = Lease(Store(out), "another")
    other.acquire(pytest.fail)
    try:
        code, _, err = cmd("render", manifest, "--output", out, "--model", "toy", *more)
    finally:
        other.release()
    assert code == 2 and f"--output: {out}, in use by run another on " in err
    assert not Path(out, "run.json").exists() and not Path(out, "dataset.json").exists()


@pytest.mark.parametrize(
    "given, seconds",
    [((), math.inf), (("--shard", "1/2"), 0.0), (("--shard", "1/2", "--wait-for-output", "60"), 60.0)],
)
def test_how_long_a_run_waits_for_another(cmd, manifest, out, options, given, seconds):
    assert cmd("render", manifest, "--output", out, "--model", "toy", *given)[0] == 0
    assert wait_seconds(options[0].wait_for_output, options[0].selection) == seconds


def test_an_output_in_the_copy_of_a_job(cmd, manifest, tmp_path, monkeypatch):
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    monkeypatch.setenv("HOME", "/home/me")
    for folder in (copy, copy / "jobs"):
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        for output in ("out", f"{folder}/out", f"file://{folder}/out"):
            message = usage(cmd, "render", manifest, "--output", output, "--model", "toy")
            assert f"--output: {folder}/out, is in the copy that Ray makes" in message
            assert "legal: a place outside of it, such as /home/me/out, s3:// or gs://" in message
        assert not (folder / "out").exists()


def test_a_path_means_the_same_in_every_place(cmd, tmp_path, monkeypatch, options, toy):
    home = tmp_path / "home"
    (home / "pics").mkdir(parents=True)
    (home / "work").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    write_jsonl(home / "m.jsonl", [{**GOOD, "id": "a"}, {**GOOD, "id": "b", "seed": 4}])
    (home / "ids.txt").write_bytes("b\r\n".encode("utf-16"))
    (home / "run.yaml").write_text("output: ~/ds/\nimage-root: [~/pics, ../pics]\n")
    forms = ("~/{}", "../{}", (home / "{}").as_uri(), f"file:{home}/{{}}", f"{home}/work//../{{}}")
    for form in (form.replace("%7B%7D", "{}") for form in forms):
        place = form.format
        flags = model_flags({name: place(Path(path).name) for name, path in toy.items()})
        flags += ["--image-root", place("pics"), "--ids", place("ids.txt"), "--lora", place("l.safetensors")]
        code, _, err = cmd("render", place("m.jsonl"), f"--output={place('ds')}/", *flags)
        assert code == 0, err
        given = options.pop()
        assert (given.manifest, given.output, given.image_roots) == (f"{home}/m.jsonl", f"{home}/ds", (f"{home}/pics",))
        assert given.selection.ids == {"b"} and given.model.loras[0].path == f"{home}/l.safetensors"
        assert given.model.checkpoint_path == str(home / Path(toy["checkpoint_path"]).name)
        code, _, err = cmd("render", place("m.jsonl"), "--config", place("run.yaml"), "--model", "toy")
        assert code == 0, err
        assert (options[0].output, options.pop().image_roots) == (f"{home}/ds", (f"{home}/pics",) * 2)
        for command in ("status", "report", "verify"):
            assert f"{home}/ds: no " in usage(cmd, command, place("ds"))
    assert "--ids: ~/none.txt, cannot be read (no such file)" in usage(
        cmd, "render", "m", "--output", "o", "--model", "toy", "--ids", "~/none.txt"
    )


@pytest.mark.parametrize("uri", ["hf://one", "hf://", "hf://org/repo//x", "hf://org/repo@"])
def test_a_uri_that_names_no_file_of_the_hub(cmd, manifest, out, uri):
    message = usage(cmd, "render", manifest, "--output", out, "--checkpoint-path", uri)
    assert f"--checkpoint-path: {uri}, names no file of the Hub; legal: hf://org/repo@revision/file" in message


def test_the_hub_without_its_package(cmd, manifest, out, monkeypatch):
    monkeypatch.setattr("ltx_ray.storage.hub.importlib.util.find_spec", lambda name: None)
    message = usage(cmd, "render", manifest, "--output", out, "--lora", "hf://org/repo@main/x.safetensors", "0.5")
    assert "--lora: hf://org/repo@main/x.safetensors, needs the package huggingface_hub" in message


def test_an_output_of_an_unknown_scheme(cmd, manifest):
    assert "nowhere" in usage(cmd, "render", manifest, "--output", "nowhere://x/y", "--model", "toy")


def model_flags(toy, **changes) -> list[str]:
    paths = {**toy, **changes}
    return [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]


@pytest.mark.parametrize("version", ["2.0", "2.5.1"])
def test_a_checkpoint_of_another_generation(cmd, manifest, out, toy, tmp_path, version):
    path = checkpoint(tmp_path, version)
    message = usage(cmd, "render", manifest, "--output", out, *model_flags(toy, checkpoint_path=path))
    assert f"{path}: model_version is {version!r}; legal: 2.3.x" in message


def test_another_architecture_is_refused_while_planning(cmd, manifest, out, toy, tmp_path):
    """Not only when every gang has failed to load it."""
    config = json.dumps({"transformer": {**REQUIRED, "qk_norm": "layer_norm"}})
    path = checkpoint(tmp_path, config=config)
    message = usage(cmd, "plan", manifest, "--output", out, *model_flags(toy, checkpoint_path=path))
    assert f"{path}: config.transformer.qk_norm is 'layer_norm'; legal: 'rms_norm' (LTX-2.3)" in message


def test_weights_that_are_missing_or_cut_off(cmd, manifest, out, toy, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(toy["checkpoint_path"]).read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    for flag, path, words in [
        ("checkpoint_path", cut, "truncated"),
        ("checkpoint_path", toy["distilled_lora"], "not an LTX checkpoint"),
        ("spatial_upsampler_path", tmp_path / "none.safetensors", "cannot be read"),
        ("distilled_lora", toy["checkpoint_path"], "holds no LoRA"),
        ("gemma_root", tmp_path / "empty", "has no config.json"),
    ]:
        message = usage(cmd, "render", manifest, "--output", out, *model_flags(toy, **{flag: path}))
        assert f"{path}" in message and words in message


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n", "a Git LFS pointer"),
        (b"<!doctype html>\n<html>404</html>", "a web page"),
        (b"PK\x03\x04" + b"\0" * 60, "a zip archive, which PyTorch's .pt and .ckpt files are too"),
        (b"\x80\x02}q\x00." + b"\0" * 60, "a pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 60, "a GGUF file"),
        (b"", "an empty file"),
    ],
)
def test_files_of_another_kind_are_named_for_what_they_are(cmd, manifest, out, toy, tmp_path, content, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for option in ("checkpoint_path", "spatial_upsampler_path", "distilled_lora"):
        message = usage(cmd, "render", manifest, "--output", out, *model_flags(toy, **{option: path}))
        assert f"{path}: not a safetensors file but {kind}" in message
    message = usage(cmd, "plan", manifest, "--model", "toy", "--lora", path)
    assert f"{path}: not a safetensors file but {kind}" in message


def test_a_lora_in_another_files_place_is_named(cmd, manifest, out, toy):
    for option, wanted in (("checkpoint_path", "an LTX checkpoint"), ("spatial_upsampler_path", "a spatial upsampler")):
        message = usage(cmd, "plan", manifest, "--output", out, *model_flags(toy, **{option: toy["distilled_lora"]}))
        assert f"{toy['distilled_lora']}: not {wanted}" in message and "but a LoRA; legal: --lora" in message


def test_a_pointer_in_place_of_a_tokenizer_or_of_weights(cmd, manifest, out, toy, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    for name in ("tokenizer.json", "model.safetensors"):
        root = tmp_path / name
        shutil.copytree(toy["gemma_root"], root)
        (root / name).write_bytes(pointer)
        message = usage(cmd, "plan", manifest, "--output", out, *model_flags(toy, gemma_root=root))
        assert f"{root / name}: not a" in message and "but a Git LFS pointer" in message


def test_a_lora_that_wants_a_reference_or_is_not_finite_is_refused_before_anything_starts(cmd, manifest, out, tmp_path):
    import torch
    from safetensors.torch import save_file

    path, module = tmp_path / "style.safetensors", "diffusion_model.transformer_blocks.0.attn1.to_q"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 128), f"{module}.lora_B.weight": torch.ones(128, 2)}
    save_file(factors, path, {"reference_downscale_factor": "2"})
    for command in ("plan", "render"):
        message = usage(cmd, command, manifest, "--output", out, "--model", "toy", "--lora", path)
        assert f"{path}: wants a reference video, which no row can give" in message
    assert not Path(out).exists()


def test_a_lora_that_fits_no_layer_or_has_other_widths(cmd, manifest, out, tmp_path):
    for module, words in (("diffusion_model.unet", "fits no layer"), (f"diffusion_model.{BLOCK}", "has factors A")):
        factors = {f"{module}.lora_A.weight": (2, 3), f"{module}.lora_B.weight": (5, 2)}
        path = write_safetensors(tmp_path / "style.safetensors", factors)
        message = usage(cmd, "render", manifest, "--output", out, "--model", "toy", "--lora", path, "0.5")
        assert path in message and words in message


def test_tp_that_does_not_divide_the_heads(cmd, manifest, out):
    for tp in ("3", "0"):
        assert f"--tp: {tp}, legal: a divisor of the 4 attention heads" in usage(
            cmd, "render", manifest, "--output", out, "--model", "toy", "--tp", tp
        )


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "no model: give --checkpoint-path"),
        (["--model", "huge"], "--model: 'huge', legal: miniature"),
        (["--model", "toy", "--gemma-root", "g"], "--gemma-root exclude each other"),
        (["--model", "toy", "--dtype", "fp16"], "--dtype: 'fp16', legal: bfloat16 or float32"),
        (["--model", "toy", "--precision", "fp4"], "--precision: 'fp4', legal: bf16 or fp8"),
        (["--model", "toy", "--noise-device", "gpu"], "--noise-device: 'gpu', legal: model or cpu"),
        (["--model", "toy", "--stop-after", "stage2"], "--stop-after: 'stage2', legal: stage1"),
        (["--model", "toy", "--num-inference-steps", "1"], "--num-inference-steps: 1, legal: a whole number from 2"),
        (["--model", "toy", "--seed", "-1"], "--seed: -1, legal: a whole number from 0"),
        (["--model", "toy", "--frame-rate", "0"], "--frame-rate: 0.0, legal: frames a second"),
        (["--model", "toy", "--video-cfg-guidance-scale", "nan"], "--video-cfg-guidance-scale: nan"),
        (["--model", "toy", "--video-stg-blocks", "a,b"], "--video-stg-blocks: 'a,b', legal: block numbers"),
        (["--model", "toy", "--stage1-replicas", "0"], "--stage1-replicas: '0', legal: auto or a number from 1"),
        (["--model", "toy", "--stage2-replicas", "many"], "--stage2-replicas: 'many', legal: auto or"),
        (["--model", "toy", "--limit", "0"], "--limit: 0, legal: a number from 1"),
        (["--model", "toy", "--max-attempts", "0"], "--max-attempts: 0, legal: a number from 1"),
        (["--model", "toy", "--ids", "none.txt"], "--ids: none.txt, cannot be read"),
        (["--model", "toy", "--shard", "3/3"], "--shard: '3/3', legal: I/N"),
        (["--model", "toy", "--stage1-replicas", "²"], "--stage1-replicas: '²', legal: auto or a number from 1"),
        (["--model", "toy", "--stage1-replicas", "9" * 5000], "legal: auto or a number from 1"),
        (["--model", "toy", "--shard", "1/³"], "--shard: '1/³', legal: I/N"),
        (["--model", "toy", "--video-stg-blocks", "9" * 5000], "legal: block numbers, such as 28,29"),
        (["--model", "toy", "--shard", "1"], "--shard: '1', legal: I/N"),
        (["--model", "toy", "--lora", "none.safetensors"], "none.safetensors: cannot be read"),
        (["--model", "toy", "--lora", "none.safetensors", "nan"], "--lora: none.safetensors nan, legal: a finite"),
        (["--model", "toy", "--lora", "a/x.safetensors", "--lora", "b/x.safetensors"], "two files are named 'x'"),
        (["--config", "none.yaml"], "--config: none.yaml, cannot be read"),
    ],
)
def test_a_wrong_option(cmd, manifest, out, flags, words):
    assert words in usage(cmd, "render", manifest, "--output", out, *flags)


def test_resolved_rows_have_no_credentials_of_their_images_root(cmd, bucket):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    Store(bucket).write_bytes("a.png", picture.getvalue())
    Store(bucket).write_bytes("m.jsonl", json.dumps({**GOOD, "images": [{"path": "a.png"}]}).encode())
    uri = bucket.replace("s3://", "s3://KEY:verySecret1@")
    code, out, err = cmd("plan", f"{uri}/m.jsonl", "--model", "toy", "--resolved")
    assert code == 0 and f'"path":"{bucket}/a.png"' in out and "verySecret1" not in out + err


def test_credentials_of_arguments_that_do_not_parse_are_masked(cmd, manifest):
    uri = "s3://KEY:verySecret1@b/x"
    for args in (["plan", manifest, uri], [uri], ["status", uri, uri], ["plan", manifest, f"--no-such-option={uri}"]):
        code, out, err = cmd(*args)
        assert code == 2 and err and "verySecret1" not in out + err


def test_options_that_do_not_parse(cmd, manifest, out):
    for args in (
        ["render"],
        ["render", manifest],
        ["render", manifest, "--output", out, "--model", "toy", "--no-such-option"],
        ["render", manifest, "--output", out, "--model", "toy", "--height", "tall"],
        ["no-such-command"],
    ):
        code, _, err = cmd(*args)
        assert code == 2 and err


def test_the_layout_of_a_run(cmd, manifest, out, options):
    code, _, _ = cmd("render", manifest, "--output", out, "--model", "toy", "--stage2-replicas", "0", "--tp", "2")
    assert code == 0
    assert (options[0].parallel.tp, options[0].parallel.stage1, options[0].parallel.stage2) == (2, None, 0)


# --- illegal rows: exit code 3, and the others are planned ------------------------------------------------

ILLEGAL_ROWS = [
    ({"height": 1080}, ":1:height (x): 1080, legal: a positive multiple of 64 (next: 1024 or 1088)"),
    ({"num_frames": 10}, ":1:num_frames (x): 10, legal: 8*k + 1 with k >= 0 (next: 9 or 17)"),
    ({"num_inference_steps": 1}, ":1:num_inference_steps (x): 1, legal: a whole number from 2"),
    ({"id": "../x"}, ":1:id ('../x'): '../x', legal: 1 to 128 of the characters"),
    ({"images": [{"path": "/etc/passwd"}]}, ":1:images (x): '/etc/passwd', legal: a path inside an --image-root"),
    ({"pipeline": "turbo"}, ":1:pipeline (x): 'turbo', legal: hq"),
    ({"loras": [{"name": "none"}]}, ":1:loras (x): 'none', legal: a name declared with --lora"),
    ({"prompt": " "}, ":1:prompt (x): ' ', legal: text that is not blank"),
    (
        {"num_frames": 577, "height": 1088, "width": 1920, "num_inference_steps": 15},
        ":1:num_frames (x): 577, legal: at most 569 at 1088x1920 with 15 steps: the noise levels of",
    ),
    (
        {"num_frames": 9, "height": 16_128, "width": 16_384, "num_inference_steps": 15},
        ":1:height (x): 16128, legal: a size less than 16128x16384: a frame has too many tokens",
    ),
    (
        {"height": 16_384, "width": 16_384, "pipeline": "base"},
        ":1:height (x): 16384, legal: at most 16128 where the width is 16384, as FFmpeg takes pictures",
    ),
    (
        {"height": 64 * 2**20},
        ":1:height (x): 67108864, legal: at most 16384, the longest side that H.264 encoders take",
    ),
    ({"video_cfg_scale": 1e300}, ":1:video_cfg_scale (x): 1e+300, legal: a finite number that float32 holds (0, or"),
]


@pytest.mark.parametrize("changes, words", ILLEGAL_ROWS)
def test_an_illegal_row_is_listed_and_the_others_are_planned(cmd, tmp_path, changes, words):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{**GOOD, "id": "x", **changes}, {**GOOD, "seed": 1}])
    code, out, _ = cmd("plan", manifest, "--model", "toy")
    assert code == 3
    assert f"illegal  {manifest}{words}" in out
    assert "2 rows: 1 to render, 1 illegal" in out


def test_a_second_row_with_an_id_and_other_content(cmd, tmp_path):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{**GOOD, "id": "x"}, {**GOOD, "id": "x", "seed": 3}])
    code, out, _ = cmd("plan", manifest, "--model", "toy")
    assert code == 3
    assert f"illegal  {manifest}:2:id (x): 'x', legal: an id of its own" in out


# --- plan ----------------------------------------------------------------------------------------


def test_plan_of_good_rows(cmd, tmp_path):
    rows = [{**GOOD, "id": "cat", "seed": 5, "frame_rate": 29.97}, {**GOOD, "prompt": "line\none " + "x" * 99}]
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    code, out, err = cmd("plan", manifest, "--model", "toy")
    assert (code, err) == (0, "")
    first, second, total, cost, size = out.splitlines()
    assert first == f"todo     {manifest}:1 (cat) hq 64x64x9@29.97 steps 2 seed 5: a cat"
    assert "line one xxx" in second and second.endswith("...")
    assert total == "2 rows: 2 to render"
    assert "TFLOP in 2 clips" in cost and "$" not in cost
    assert size.startswith("output: about ") and size.endswith(" for each clip that is being decoded")


def test_plan_tells_dollars_and_that_the_disk_is_too_small(cmd, tmp_path, manifest, monkeypatch):
    _, out, err = cmd("plan", manifest, "--model", "toy", "--gpu-price", "2.5", "--output", tmp_path / "none" / "yet")
    assert re.search(r" GPU hours, \$\S+: \$\S+ a clip, \$\S+ an hour of video$", out.splitlines()[-2]) and not err
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    _, _, err = cmd("plan", manifest, "--model", "toy", "--output", tmp_path / "none" / "yet")
    assert f"{tmp_path}/none/yet: about " in err and "are needed there and 1 kB are free" in err
    assert usage(cmd, "plan", manifest, "--model", "toy", "--gpu-price", "-1").startswith(
        "error: --gpu-price: -1.0, legal: a number from 0"
    )


def test_plan_against_a_dataset(cmd, manifest, out, toy):
    item = next(run.prepare(_options(manifest, out)).plan.open())
    writer = dataset_writer(Store(out))
    writer.write_index(item.item.item_id, item.request, RENDERED)
    finish(writer)
    code, text, _ = cmd("plan", manifest, "--output", out, "--model", "toy")
    assert code == 0
    assert "1 rows: 1 done\nnothing to render" in text
    assert "1 to render" in cmd("plan", manifest, "--output", out, "--model", "toy", "--seed", "3")[1]
    assert "1 to render" in cmd("plan", manifest, "--model", "toy")[1]


def _options(manifest: str, out: str) -> run.Options:
    values = {**{option.name: None for option in MODEL_OPTIONS}, "model": "toy", "lora": ()}
    files = model_files(values)
    return run.Options(manifest=manifest, output=out, model=files)


def test_plan_lists_the_first_rows_or_all_and_takes_a_selection(cmd, tmp_path):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{**GOOD, "seed": n, "id": f"r{n}"} for n in range(50)])
    (tmp_path / "ids").write_text("r3\n\n r49 \n")

    def listed(*flags) -> list[str]:
        return [line for line in cmd("plan", manifest, "--model", "toy", *flags)[1].splitlines() if "todo" in line]

    assert len(listed()) == 40
    assert len(listed("--all")) == 50
    assert len(listed("--limit", "7")) == 7
    assert [line.split("(")[1].split(")")[0] for line in listed("--ids", tmp_path / "ids")] == ["r3", "r49"]
    assert len(listed("--shard", "2/25")) == 2


def test_selected_ids_that_are_missing_are_named(cmd, tmp_path):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{**GOOD, "seed": n, "id": f"r{n}"} for n in range(50)])
    (tmp_path / "ids").write_text("r3\nr48\nnone\n")

    def said(*flags) -> str:
        return cmd("plan", manifest, "--model", "toy", "--ids", tmp_path / "ids", *flags)[2]

    assert f"--ids: 1 ids are not in {manifest}, such as none" in said()
    assert f"--ids: 1 ids are not in {manifest}, such as none" in said("--limit", "3")
    assert "--ids" not in said("--limit", "1"), "r48 comes later"
    assert f"--ids: 2 ids are not in shard 0/2 of {manifest}, such as none, r3" in said("--shard", "0/2")


def test_row_defaults_are_given_under_the_references_names(cmd, tmp_path, options):
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "a"}])
    flags = {
        "--negative-prompt": "", "--seed": "3", "--height": "64", "--width": "128", "--num-frames": "9",
        "--frame-rate": "25", "--num-inference-steps": "4", "--video-cfg-guidance-scale": "2",
        "--video-stg-guidance-scale": "1", "--video-rescale-scale": "0.5", "--a2v-guidance-scale": "1.5",
        "--video-stg-blocks": "1,2", "--video-skip-step": "1", "--audio-cfg-guidance-scale": "6",
        "--audio-stg-guidance-scale": "0", "--audio-rescale-scale": "0.7", "--v2a-guidance-scale": "2.5",
        "--audio-stg-blocks": "3", "--audio-skip-step": "2", "--distilled-lora-strength-stage-1": "0.3",
        "--distilled-lora-strength-stage-2": "0.6",
    }  # fmt: skip
    code, _, err = cmd("render", manifest, "--output", "o", "--model", "toy", *sum(flags.items(), ()))
    assert code == 0, err
    [given] = options
    [planned] = run.prepare(given).plan.open()
    r = planned.request
    assert (r.negative_prompt, r.seed, r.height, r.width, r.num_frames, r.frame_rate) == ("", 3, 64, 128, 9, 25.0)
    assert (r.num_inference_steps, r.video_modality_scale, r.audio_modality_scale) == (4, 1.5, 2.5)
    assert (r.video_stg_blocks, r.audio_stg_blocks) == ((1, 2), (3,))
    assert (r.distilled_lora_strength_stage_1, r.distilled_lora_strength_stage_2) == (0.3, 0.6)
    assert len(given.row_defaults) == len(flags)


# --- LoRAs and config files ----------------------------------------------------------------------


def test_loras_with_and_without_strength(cmd, manifest, options):
    args = ["--lora", "a/one.safetensors", "0.5", "--lora", "two.safetensors", "--lora", "-3.safetensors", "-1e-1"]
    code, _, err = cmd("render", "--output", "o", "--model", "toy", *args, manifest)
    assert code == 0, err
    assert options[0].manifest == manifest
    assert options[0].model.loras == (
        LoraSpec("one", resolve("a/one.safetensors"), 0.5),
        LoraSpec("two", resolve("two.safetensors"), 1.0),
        LoraSpec("-3", resolve("-3.safetensors"), -0.1),
    )
    cmd("render", manifest, "--output", "o", "--model", "toy", "--lora=x.safetensors", "2")
    assert options[1].model.loras == (LoraSpec("x", resolve("x.safetensors"), 2.0),)


def test_a_lora_of_strength_minus_zero_gives_the_item_of_zero(cmd, manifest, toy):
    """So a retry reads it, since a row's -0.0 is 0."""
    for strength in ("0", "-0.0", "-0"):
        _, out, err = cmd("plan", manifest, "--model", "toy", "--lora", toy["distilled_lora"], strength, "--resolved")
        assert '"strength": 0.0' in out or '"strength":0.0' in out, err


CONFIG = {
    "output": "from-config",
    "model": "toy",
    "num-inference-steps": 3,
    "num_frames": 17,
    "video-stg-blocks": [1, 2],
    "a2v_guidance_scale": 1,
    "lora": [{"path": "a.safetensors", "strength": 0.5}, {"path": "b.safetensors"}, "c.safetensors"],
    "save-latents": True,
    "stage2-replicas": 0,
    "image-root": ["/x", "/y"],
    "max-failed-fraction": 0.5,
    "limit": 3,
}


def test_values_of_a_config_file_are_converted_as_those_of_the_command_line(cmd, manifest, tmp_path, options):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: toy\nframe-rate: 29.97\nseed: 7\ngrace: 5\npreflight: no\nstage1-replicas: auto\nray-address:\n"
        "negative-prompt: 3\ndtype: float32\nshard: 1/4\n"
    )
    code, _, err = cmd("render", manifest, "--output", "o", "--config", path)
    assert code == 0, err
    [given] = options
    assert dict(given.row_defaults) == {"frame_rate": 29.97, "seed": 7, "negative_prompt": "3"}
    assert given.limits.grace == 5.0 and isinstance(given.limits.grace, float)
    assert not given.preflight and given.parallel.stage1 is None and given.ray_address is None
    assert given.numerics.dtype == "float32" and given.selection.shard == (1, 4)


@pytest.mark.parametrize(
    "content, words",
    [
        ("dtype: fp16", "--dtype: 'fp16', legal: bfloat16 or float32"),
        ("limit: 0", "--limit: 0, legal: a number from 1"),
        ("lora: [{path: a, strength: high}]", "--lora: a high, legal: a finite number as its strength"),
    ],
)
def test_values_of_a_config_file_are_checked_as_those_of_the_command_line(cmd, manifest, tmp_path, content, words):
    (tmp_path / "run.yaml").write_text(f"model: toy\n{content}\n")
    assert words in usage(cmd, "render", manifest, "--output", "o", "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_config_file_holds_the_same_names_and_the_command_line_wins(cmd, manifest, tmp_path, options, form):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    code, _, err = cmd("render", manifest, *form.format(path).split(), "--num-inference-steps", "5", "--limit", "1")
    assert code == 0, err
    [given] = options
    assert given.output == resolve("from-config")
    assert dict(given.row_defaults) == {
        "num_inference_steps": 5, "num_frames": 17, "video_stg_blocks": [1, 2], "video_modality_scale": 1.0
    }  # fmt: skip
    assert [(x.name, x.strength) for x in given.model.loras] == [("a", 0.5), ("b", 1.0), ("c", 1.0)]
    assert given.save_latents and given.parallel.stage2 == 0
    assert given.image_roots == ("/x", "/y")
    assert (given.limits.max_failed_fraction, given.selection.limit) == (0.5, 1)


def test_a_config_file_of_one_lora_and_one_root(cmd, manifest, tmp_path, options):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "toy", "lora": "a.safetensors", "image_root": "/x", "shard": "0/2"}))
    code, _, err = cmd("render", manifest, "--output", "o", "--config", path)
    assert code == 0, err
    assert options[0].model.loras == (LoraSpec("a", resolve("a.safetensors"), 1.0),)
    assert options[0].image_roots == ("/x",)
    assert options[0].selection.shard == (0, 2)


def test_an_empty_config_file_changes_nothing(cmd, manifest, tmp_path, options):
    (tmp_path / "run.yaml").write_text("")
    assert cmd("render", manifest, "--output", "o", "--model", "toy", "--config", tmp_path / "run.yaml")[0] == 0


@pytest.mark.parametrize(
    "content, words",
    [
        ("steps: 3", "unknown option 'steps'; legal: a2v-guidance-scale,"),
        ("- model", "holds no mapping"),
        ("model: [", "cannot be read"),
        ("lora: [{strength: 1}]", "lora: {'strength': '1'}, legal: "),
        ("lora: [{path: a, weight: 1}]", "lora: {'path': 'a', 'weight': '1'}, legal: "),
    ],
)
def test_a_config_file_that_is_refused(cmd, manifest, tmp_path, content, words):
    (tmp_path / "run.yaml").write_text(content)
    message = usage(cmd, "render", manifest, "--output", "o", "--config", tmp_path / "run.yaml")
    assert str(tmp_path / "run.yaml") in message and words in message


# --- other commands ------------------------------------------------------------------------------


def test_inspect(cmd, toy, tmp_path):
    code, out, _ = cmd("inspect", toy["checkpoint_path"])
    assert code == 0
    for words in ("model_version 2.3.0", "transformer: ", "video VAE: ", "vocoder: ", "4 layers, 4 heads"):
        assert words in out
    assert "other:" not in out
    assert "LoRA: " in cmd("inspect", toy["distilled_lora"])[1]
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "not a safetensors file" in usage(cmd, "inspect", tmp_path / "x.bin")
    code, out, _ = cmd("inspect", checkpoint(tmp_path, config='{"transformer": [1]}'))
    assert code == 0 and 'config: {"transformer": [1]}' in out


def test_status_and_report_of_no_dataset(cmd, tmp_path):
    assert f"{tmp_path}: no run.json; legal: the --output of a run" in usage(cmd, "status", tmp_path)
    assert "no run.json" in usage(cmd, "status", tmp_path / "none")
    assert "no dataset" in usage(cmd, "report", tmp_path / "none")
    assert "no dataset" in usage(cmd, "report", tmp_path)


def test_status_of_a_run(cmd, tmp_path):
    store = Store(str(tmp_path))
    record = {"run_id": "r1", "state": "finished", "manifest": "m.jsonl", "started_at": "2026-01-01"}
    store.write_bytes("run.json", json.dumps({**record, "clips_per_hour": 982.4}).encode())
    events = [
        {"t": 0.0, "event": "call", "replica": "stage1-0", "stage": "stage1", "id": "cat", "seconds": 2.0},
        {"t": 100.0, "event": "item_finished"},
        {"t": 136.0, "event": "item_finished"},
    ]
    store.write_bytes("events.jsonl", "".join(json.dumps(e) + "\n" for e in events).encode() + b'{"t": 1, "ev')
    code, out, _ = cmd("status", tmp_path)
    assert code == 0
    assert "run r1: finished\nmanifest m.jsonl, started 2026-01-01\n0 rows in the index, 0 in failed/\n" in out
    assert "stage1-0: last finished stage1 of cat, 2.0 s, " in out
    assert out.endswith("\n982 clips/h\n")


def test_status_counts_rows_whose_images_are_out_of_reach_as_the_infrastructures(cmd, tmp_path):
    store = Store(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "r1", "state": "finished"}))
    writer = dataset_writer(store)
    failure = Failure("plan", 0, "infrastructure", "nobody answers")
    writer.write_unplanned(RawRow("m.jsonl", 1, {"prompt": "a cat"}), failure)
    writer.write_failed("a" * 32, request(id="b"), RawRow("m.jsonl", 2, {}), failure)
    finish(writer)
    assert "2 in failed/ (0 illegal, 0 of their own fault, 2 of infrastructure's)" in cmd("status", tmp_path)[1]
    assert json.loads(cmd("status", tmp_path, "--json")[1])["rows"]["failed"]["infra"] == 2


@pytest.mark.parametrize(
    ("expected", "counts", "line"),
    [
        (1200, {"rendered": 30, "already_done": 10, "failed": 2, "illegal": 1}, "40 of 1,200 rows done, 3 failed"),
        (None, {"rendered": 4}, "4 rows done"),
        ("many", {"rendered": [], "failed": None}, "0 rows done"),
    ],
)
def test_status_says_how_far_the_run_is(cmd, tmp_path, expected, counts, line):
    record = {"run_id": "r1", "state": "running", "expected_rows": expected, "counts": counts}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert f"\n{line}\n0 rows in the index" in cmd("status", tmp_path)[1]
    assert json.loads(cmd("status", tmp_path, "--json")[1])["expected_rows"] == expected


def test_status_tells_what_the_run_has_cost_and_the_gpu_time_of_all_runs(cmd, tmp_path):
    cost = {"gpu_hours": 12.3, "dollars": 30.75, "dollars_per_clip": 0.0427, "dollars_per_video_hour": 30.5}
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "r1", "state": "finished", "cost": cost}))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "gpu_time.json").write_text('{"epoch": 1, "gpu_seconds": 72000.0}')
    _, out, _ = cmd("status", tmp_path)
    assert "cost of the run: 12.30 GPU hours, $30.75: $0.0427 a clip, $30.50 an hour of video\n" in out
    assert "all runs into this output: 20.00 GPU hours\n" in out
    _, out, _ = cmd("status", tmp_path, "--json")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (found["run_id"], found["state"], found["cost"], found["gpu_hours_of_all_runs"]) == (
        "r1",
        "finished",
        cost,
        20,
    )
    assert found["rows"]["index"] == 0 and found["rows"]["failed"] == {"illegal": 0, "row": 0, "infra": 0}
    (tmp_path / "run.json").write_text('{"state": "finished", "cost": "damaged"}')
    _, out, _ = cmd("status", tmp_path)
    assert "cost of the run" not in out and "all runs into this output: 20.00 GPU hours\n" in out


def test_status_passes_over_damaged_events(cmd, tmp_path):
    good = {"t": 1.0, "event": "call", "replica": "text-0", "stage": "text", "id": "a", "seconds": 2.0}
    bad = [{"t": 1, "event": "call"}, {"t": 1, "event": "gang_lost"}, {**good, "t": "x"}, {**good, "seconds": None}]
    (tmp_path / "run.json").write_text('{"state": "finished"}')
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (good, *bad)))
    code, out, _ = cmd("status", tmp_path)
    assert code == 0 and out.count("last finished") == 1 and "text-0: last finished text of a, 2.0 s" in out


def test_status_counts_rows_that_are_not_yet_folded_and_fold_folds_them(cmd, tmp_path):
    store = Store(str(tmp_path / "out"))
    store.write_bytes("run.json", b"{}")
    writer = dataset_writer(store)
    writer.write_index(
        "a" * 32, request(id="a"), dataclasses.replace(RENDERED, clip=dataclasses.replace(RENDERED.clip, path=None))
    )
    writer.log.commit()
    assert "\n0 rows in the index, 1 finished and not yet folded, 0 in failed/\n" in cmd("status", store.uri)[1]
    assert cmd("fold", store.uri) == (0, "1 rows folded\n", "")
    assert "\n1 rows in the index, 0 in failed/\n" in cmd("status", store.uri)[1]


def test_status_of_a_run_that_goes_on_and_of_one_that_was_killed(cmd, tmp_path, monkeypatch):
    """The rate is that of the console, at the time of asking, or at the last event of a run that was killed."""
    monkeypatch.setattr("ltx_ray.cli.status.time", SimpleNamespace(time=lambda: 7300.0))
    store = Store(str(tmp_path))
    record = {"run_id": "r1", "state": "running", "started_at": "1970-01-01T00:00:00Z", "clips_per_hour": None}
    store.write_bytes("run.json", json.dumps(record).encode())
    call = {"t": 110.0, "event": "call", "replica": "stage1-0", "stage": "stage1", "id": "cat", "seconds": 10.0}
    done = [
        {"t": t, "event": "item_finished", "item_id": item} for t, item in ((200.0, "a"), (460.0, "b"), (460.0, "b"))
    ]
    store.write_bytes("events.jsonl", "".join(json.dumps(e) + "\n" for e in [call, *done]).encode())
    assert cmd("status", tmp_path)[1].endswith("\n20 clips/h when it was interrupted\n")
    store.write_bytes("_lease.json", json.dumps({"expires": 1e12, "run_id": "r1", "host": "x", "pid": 1}).encode())
    assert cmd("status", tmp_path)[1].endswith("\n1 clips/h\n")


def test_status_reads_the_summary_of_the_record(cmd, tmp_path, monkeypatch):
    monkeypatch.setattr("ltx_ray.cli.status.time", SimpleNamespace(time=lambda: 7300.0))
    store = Store(str(tmp_path))
    call = {"stage": "stage1", "id": "cat", "seconds": 10.0, "t": 7290.0}
    summary = {"at": 7295.0, "clips_per_hour": 20.0, "events": {"call": 9}, "replicas": {"stage1-0": call}}
    record = {"run_id": "r1", "state": "running", "started_at": "1970-01-01T00:00:00Z", "summary": summary}
    store.write_bytes("run.json", json.dumps(record).encode())
    store.write_bytes(
        "events.jsonl", b'{"t": 1.0, "event": "call", "replica": "text-0", "stage": "text", "seconds": 1}'
    )
    called = "stage1-0: last finished stage1 of cat, 10.0 s, 10 s ago"
    assert cmd("status", tmp_path)[1].endswith(f"\n{called}\n20 clips/h when it was interrupted\n")
    store.write_bytes("_lease.json", json.dumps({"expires": 1e12, "run_id": "r1", "host": "x", "pid": 1}).encode())
    assert cmd("status", tmp_path)[1].endswith(f"\n{called}\n20 clips/h\n")


@pytest.mark.parametrize("lease", [None, {"expires": 1.0, "run_id": "r1", "host": "elsewhere", "pid": 1}])
def test_status_of_a_killed_run(cmd, tmp_path, lease):
    store = Store(str(tmp_path))
    store.write_bytes("run.json", b'{"run_id": "r1", "state": "running"}')
    if lease is not None:
        store.write_bytes("_lease.json", json.dumps(lease).encode())
    assert "run r1: interrupted (run the same command to resume)" in cmd("status", tmp_path)[1]
    store.write_bytes("_lease.json", json.dumps({"expires": 1e12, "run_id": "r1", "host": "x", "pid": 1}).encode())
    assert "run r1: running" in cmd("status", tmp_path)[1]


def test_retry_without_failures(cmd, out):
    code, _, err = cmd("retry", out, "--model", "toy")
    assert code == 2 and f"{out}: no dataset; legal: the --output of a run" in err
    Path(out, "index").mkdir(parents=True)
    code, stdout, _ = cmd("retry", out, "--model", "toy")
    assert code == 0 and f"nothing failed in {out}" in stdout


def test_retry_renders_what_failed(cmd, out, options):
    Path(out, "failed").mkdir(parents=True)
    Path(out, "failed", f"part-row-{'0' * 32}-00000000.parquet").touch()
    code, _, err = cmd("retry", out, "--model", "toy", "--seed", "4", "--image-root", "/x")
    assert code == 0, err
    assert (options[0].manifest, options[0].output) == (f"{out}/failed", out)
    assert options[0].retry_failed and options[0].image_roots == ("/x",)


# --- the help page and the defaults --------------------------------------------------------------


def test_the_help_of_each_command_fits_80_columns(cmd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in app.app.commands.items():
        code, out, _ = cmd(name, "--help")
        assert code == 0 and max(map(len, out.splitlines())) <= 80
        for option in command.params:
            assert option.opts[0] in out if option.opts[0].startswith("-") else option.name.upper() in out
        titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert len(titles) == len(set(titles)), titles
        # Texts are not squeezed into a narrow column: fewer than half of the lines continue the one before.
        texts = [line for line in out.splitlines() if line.startswith("  ")]
        assert sum(line.startswith(" " * 10) for line in texts) < 0.5 * len(texts), name


def test_the_help_names_sections_and_defaults(cmd):
    _, out, _ = cmd("render", "--help")
    sections = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == [
        "Arguments", "Output", "Model", "Rows", "Defaults of columns that a row leaves empty", "Numerics", "Cluster",
        "Replicas and their layout", "Limits", "Other",
    ]  # fmt: skip
    text = " ".join(out.split())
    assert "attempts at a row [3]" in text and "time for a replica to start without any of" in text


def test_without_options_a_run_has_the_defaults_of_its_settings(cmd, manifest, options):
    assert cmd("render", manifest, "--output", "o", "--model", "toy")[0] == 0
    [given] = options
    assert given == run.Options(manifest=manifest, output=resolve("o"), model=given.model, command=given.command)


def test_the_documented_defaults_are_those_of_the_limits():
    page = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text()
    documented = dict(re.findall(r"^\| `--([a-z-]+) [A-Z]+` \| ([\d.]+|none) \|", page, re.MULTILINE))
    limits = dataclasses.asdict(RunLimits())
    assert {name.replace("-", "_") for name in documented} == set(limits)
    for name, text in documented.items():
        assert limits[name.replace("-", "_")] == (None if text == "none" else float(text)), name
