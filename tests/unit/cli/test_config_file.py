"""`--config`: what a file says means what it means on the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from ltx_ray.cli import app as cli
from ltx_ray.cli.options import CONFIG_OPTION
from ltx_ray.driver import row_traces
from ltx_ray.run import ExitCode
from tests.support.samples import write_jsonl

ROW = {"id": "a", "prompt": "a cat", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """The run that a command with this config file asks for, and the command's exit code and output."""
    asked = []
    monkeypatch.setattr(cli, "render", lambda options: asked.append(options) or ExitCode.OK)
    manifest = write_jsonl(tmp_path / "m.jsonl", [ROW])

    def call(config: str | bytes, *arguments: str, command: str = "render"):
        path = tmp_path / "c.yaml"
        path.write_bytes(config.encode() if isinstance(config, str) else config)
        output = ["--output", str(tmp_path / "o")] if command == "render" else []
        words = [command, manifest, *output, "--model", "toy", "--config", str(path), *arguments]
        found = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        return SimpleNamespace(code=found.exit_code, text=found.output, options=asked.pop() if asked else None)

    return call


@pytest.mark.parametrize(
    "line, asked_for",
    [
        ("compile: off", lambda o: o.numerics.compile == "off"),
        ("share_cards: on", lambda o: o.share_cards == "on"),
        ("share-cards: off", lambda o: o.share_cards == "off"),
        *(
            (f"{key}: {word}", lambda o: o.preflight is False)
            for key, words in {"preflight": "false no off NO 0", "no-preflight": "true yes on 1"}.items()
            for word in words.split()
        ),
        ("no_preflight: off", lambda o: o.preflight is True),
        ("preflight: yes", lambda o: o.preflight is True),
        ("preflight: ~", lambda o: o.preflight is True),
        ("save-latents: on", lambda o: o.save_latents is True),
        ("save_latents: no", lambda o: o.save_latents is False),
        ("seed: 0750", lambda o: o.row_defaults["seed"] == 750),
        ("height: 0128", lambda o: o.row_defaults["height"] == 128),
        ("frame-rate: 024", lambda o: o.row_defaults["frame_rate"] == 24.0),
        ("a2v_guidance_scale: .5", lambda o: o.row_defaults["video_modality_scale"] == 0.5),
        ("video-stg-blocks: [01, 2]", lambda o: o.row_defaults["video_stg_blocks"] == [1, 2]),
        ("video-stg-blocks: 01,2", lambda o: o.row_defaults["video_stg_blocks"] == [1, 2]),
        *(
            (f"negative-prompt: {text}", lambda o, text=text: o.row_defaults["negative_prompt"] == text)
            for text in "12:30 0750 off yes 2026-11-23 1e3 1_000 .nan".split()
        ),
        ("negative-prompt: 'null'", lambda o: o.row_defaults["negative_prompt"] == "null"),
        ("negative-prompt: ''", lambda o: o.row_defaults["negative_prompt"] == ""),
        *((f"negative-prompt: {nothing}", lambda o: o.row_defaults == {}) for nothing in ("", "~", "null")),
        ("image-root: [/on, /12:30, /null]", lambda o: o.image_roots == ("/on", "/12:30", "/null")),
        ("max-gpu-hours: 010", lambda o: o.limits.max_gpu_hours == 10.0),
        ("ray-address: 10.0.0.1:6379", lambda o: o.ray_address == "10.0.0.1:6379"),
        ("lora: [{path: a.safetensors, strength: 010}]", lambda o: o.model.loras[0].strength == 10.0),
        ("lora: 1.5", lambda o: o.model.loras[0].path.endswith("1.5") and o.model.loras[0].strength == 1.0),
        ("common: &c {seed: 1}", None),
    ],
)
def test_a_value_means_what_it_means_on_the_command_line(ask, line, asked_for):
    found = ask(line)
    if asked_for is None:
        assert found.code == 2 and "unknown option 'common'" in found.text
    else:
        assert found.code == 0, found.text
        assert asked_for(found.options)


@pytest.mark.parametrize(
    "line, words",
    [
        ("max-gpu-hours: 1:30", "--max-gpu-hours: '1:30', legal: a number from 0"),
        ("seed: 12:30", "--seed: '12:30', legal: a whole number from 0 to 2^63-1"),
        ("seed: 0x10", "--seed: '0x10', legal: "),
        ("height: 2026-11-23", "--height: '2026-11-23', legal: a positive multiple of 64"),
        ("height: -64", "--height: -64, legal: a positive multiple of 64"),
        ("frame-rate: 24:00", "--frame-rate: '24:00', legal: frames a second"),
        ("tp: two", "--tp: 'two', legal: a whole number"),
        ("limit: yes", "--limit: 'yes', legal: a number from 1"),
        ("max-failed-fraction: 50%", "--max-failed-fraction: '50%', legal: a part of the rows, from 0 to 1"),
        ("stage1-replicas: 1:30", "--stage1-replicas: '1:30', legal: auto or a number from 1"),
        ("shard: 2026-11-23", "--shard: '2026-11-23', legal: I/N"),
        ("compile: no", "--compile: 'no', legal: auto or fused or off"),
        ("preflight: maybe", "--preflight: 'maybe', legal: yes, no, true, false, on or off"),
        ("preflight: ''", "--preflight: '', legal: yes, no, true, false, on or off"),
        ("preflight: [no]", "--preflight: ['no'], legal: yes, no, true, false, on or off"),
        ("no-preflight: {a: b}", "--no-preflight: {'a': 'b'}, legal: yes, no"),
        ("seed: [1, 2]", "--seed: ['1', '2'], legal: one value, or a list"),
        ("dtype: {a: b}", "--dtype: {'a': 'b'}, legal: one value, or a list"),
        ("image-root: [a, [b]]", "--image-root: ['a', ['b']], legal: one value, or a list"),
        ("lora: [{path: a, strength: 1:30}]", "--lora: a 1:30, legal: a finite number as its strength"),
        ("lora: [{path: [a]}]", "lora: {'path': ['a']}, legal: a path, or {path, strength}"),
        ("lora: [~]", "lora: None, legal: a path, or {path, strength}"),
        ("yes: 1", "unknown option 'yes'; legal: "),
    ],
)
def test_an_error_names_the_file_the_line_the_key_the_value_and_what_is_legal(ask, tmp_path, line, words):
    found = ask(f"# of a team\ndevice: cpu\n{line}\n")
    assert found.code == 2 and found.options is None
    assert f"error: --config: {tmp_path / 'c.yaml'}: {words}" in found.text
    assert "(line 3)" in found.text and "Traceback" not in found.text


def test_the_same_value_on_the_command_line_is_refused_without_the_file(ask):
    found = ask("device: cpu", "--max-gpu-hours", "1:30")
    assert found.code == 2 and found.text == "error: --max-gpu-hours: '1:30', legal: a number from 0\n"


def test_a_wrong_value_that_the_command_line_replaces_is_not_looked_at(ask):
    found = ask("max-gpu-hours: 1:30", "--max-gpu-hours", "2")
    assert found.code == 0 and found.options.limits.max_gpu_hours == 2.0


@pytest.mark.parametrize("content", ["num_frames: 9\nnum-frames: 17", "preflight: yes\nno-preflight: yes"])
def test_an_option_that_is_given_twice_is_refused(ask, content):
    found = ask(content)
    assert found.code == 2 and "in line 2, but line 1 says it too; legal: one" in found.text


@pytest.mark.parametrize("content", ["seed: 1\nseed: 2", "seed: 1\n---\nseed: 2", "seed:\t1", "seed: !!int 1"])
def test_a_file_that_cannot_be_read_names_its_line(ask, tmp_path, content):
    found = ask(content)
    assert found.code == 2 and f"--config: {tmp_path / 'c.yaml'}, cannot be read (line " in found.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_was_written_on_windows(ask, encoding):
    assert ask("compile: off\r\nseed: 0750\r\n".encode(encoding)).options.row_defaults == {"seed": 750}


def commands():
    return [command for command in cli.app.commands.values() if CONFIG_OPTION in command.params]


def test_every_switch_of_every_command_can_be_said_both_ways(ask, monkeypatch):
    """One file serves all commands: what one of them lacks is passed over."""
    monkeypatch.setattr(row_traces, "_EXPORTER", "json")  # --trace needs a package that may be missing
    params = [p for c in commands() for p in c.params if isinstance(p, click.Option) and p.is_flag]
    assert {"--all", "--resolved", "--repair", "--save-latents", "--preflight"} <= {p.opts[0] for p in params}
    for param in params:
        for flag in (*param.opts, *param.secondary_opts):
            for word in ("yes", "no"):
                assert ask(f"{flag[2:]}: {word}").code == 0, flag


def test_every_option_of_every_command_is_known(ask):
    names = {p.opts[0][2:] for c in commands() for p in c.params if isinstance(p, click.Option)} - {"config"}
    assert {"where", "ids", "sample", "output", "shard"} <= names
    found = ask("".join(f"{name}:\n" for name in sorted(names)))
    assert found.code == 0, found.text


def test_options_of_one_command_come_from_the_file(ask):
    assert json.loads(ask("resolved: yes\nseed: 0012", command="plan").text.splitlines()[0])["seed"] == 12
