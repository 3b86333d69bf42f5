"""What docs/security.md promises."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.dataset import layout
from ltx_ray.engine.base import Rank
from ltx_ray.engine.text import TextEngine
from ltx_ray.storage import lease
from ltx_ray.storage.file_kinds import named_kind
from ltx_ray.storage.store import _PROBE

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
RUNS, TENDS = (json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
#: Functions that run what they read, by the module that has them.
RUNS_CODE = {
    "pickle": {"load", "loads", "Unpickler"}, "marshal": {"load", "loads"}, "torch": {"load"}, "joblib": {"load"},
    "builtins": {"eval", "exec", "__import__"}, "os": {"system", "popen"}, "cloudpickle": {"load", "loads"},
    "yaml": {"load", "full_load", "unsafe_load", "Loader", "FullLoader", "UnsafeLoader"},
}  # fmt: skip
#: Between processes of one run alone.
ALLOWED = {("ltx_ray/engine/negative_context.py", "pickle.loads")}


def calls(path: Path) -> set[str]:
    names = {alias: f"builtins.{alias}" for alias in RUNS_CODE["builtins"]}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(names.get(node.func.id, node.func.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{names.get(node.value.id, node.value.id)}.{node.attr}")
    return found & {f"{module}.{name}" for module, members in RUNS_CODE.items() for name in members}


def test_nothing_is_unpickled_or_run_but_what_a_runs_own_processes_send():
    files = [path for folder in ("ltx_ray", "jobs") for path in (ROOT / folder).rglob("*.py")]
    found = {(path.relative_to(ROOT).as_posix(), call) for path in files for call in calls(path)}
    assert found == ALLOWED


def test_such_calls_are_found(tmp_path):
    (tmp_path / "x.py").write_text("import pickle as p\nfrom torch import load\nload(a)\np.loads(b)\neval('1')\n")
    assert calls(tmp_path / "x.py") == {"torch.load", "pickle.loads", "builtins.eval"}


def test_the_page_quotes_what_is_said_of_a_pickle():
    text = " ".join(TEXT.split())
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    for head in (*(pickle.dumps({}, protocol) for protocol in protocols), b"PK\x03\x04"):
        assert f'"{named_kind(head)}"' in text


@pytest.fixture
def load(toy, tmp_path) -> Callable[[], None]:
    """Loads the text engine with the copy of Gemma's folder in `tmp_path`."""
    shutil.copytree(toy["gemma_root"], tmp_path / "gemma")
    files = replace(ModelFiles(**toy), gemma_root=str(tmp_path / "gemma"))
    return lambda: TextEngine(EngineSpec("", files, Numerics(device="cpu", dtype="float32"), ""), Rank()).load()


def test_code_in_the_folder_of_a_model_does_not_run(load, tmp_path):
    root, ran = tmp_path / "gemma", tmp_path / "ran"
    (root / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    settings = json.loads((root / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(ValueError):  # transformers may take a tokenizer of its own in its place
        load()
    assert not ran.exists()


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


def test_a_pickle_in_the_place_of_weights_is_not_read(load, tmp_path):
    root = tmp_path / "gemma"
    for path in root.glob("*.safetensors*"):
        path.unlink()
    (root / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(OSError, match="safetensors"):
        load()
    assert not (tmp_path / "ran").exists()
    pickle.loads((root / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run"


def resources(policy: dict, action: str) -> set[str]:
    """What stands behind the output's root in the resources for which a policy allows an action."""
    found = [r for s in policy["Statement"] if action in s["Action"] for r in s["Resource"]]
    return {resource.partition("BUCKET/dataset/")[2] for resource in found if "BUCKET/dataset/" in resource}


def test_the_policies_name_the_places_of_the_layout():
    for policy in (RUNS, TENDS):
        assert policy["Version"] == "2012-10-17" and {s["Effect"] for s in policy["Statement"]} == {"Allow"}
        assert not any("*" in action for s in policy["Statement"] for action in s["Action"])
    for action in ("s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"):
        assert resources(RUNS, action) == {"*"}
    deleted = resources(RUNS, "s3:DeleteObject")
    assert deleted == {f"{layout.STATE}/*", f"{layout.FAILED}/*", "_probe-*", "_doctor-*"}
    for path in (_PROBE, lease.LEASE_FILE, layout.SEGMENTS, layout.ASIDE):
        assert path.startswith(f"{layout.STATE}/")
    folders = {layout.CLIPS, layout.THUMBS, layout.LATENTS, layout.INDEX, layout.PREVIEWS, layout.RUNS}
    assert resources(TENDS, "s3:DeleteObject") == {f"{f}/*" for f in folders} | {layout.REPORT, layout.COMPARISON}
    item = "0" * 32
    for path in (layout.clip_path, layout.thumb_path, layout.latents_path, layout.preview_path):
        assert f"{path(item).partition('/')[0]}/*" in resources(TENDS, "s3:DeleteObject")


def test_the_audit_looks_at_every_pinned_package():
    workflow = yaml.safe_load((ROOT / ".github/workflows/audit.yml").read_text())
    (job,) = workflow["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "pip-audit --" in step.get("run", "")]
    assert command.endswith("--requirement ${{ matrix.file }}")
    for name in job["strategy"]["matrix"]["file"]:
        pins = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert pins and all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.+!-]+( *;.*)?", pin) for pin in pins)
