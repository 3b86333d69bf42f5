"""The image of cluster/Dockerfile, as far as it can be judged without building it."""

from __future__ import annotations

import re
from pathlib import Path

import ltx_ray

ROOT = Path(__file__).resolve().parents[3]
#: Packages whose versions torch decides, and FlashAttention-3, which no CPU has.
OF_TORCH = re.compile(r"torch|triton|setuptools|sympy|networkx|mpmath|nvidia-.*|cuda-.*|fa3.fwd|einops|ninja|jmespath")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, with continued lines joined."""
    lines = [line for line in (ROOT / "cluster/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    return {k.lower().replace("_", "-"): v for k, _, v in (x.partition("==") for x in lines if x and x[0] != "#")}


def test_the_base_is_given_by_whoever_builds():
    found = instructions()
    assert found[:3] == [
        ("ARG", "BASE_IMAGE"), ("ARG", "BASE_DIGEST"), ("FROM", "${BASE_IMAGE}@${BASE_DIGEST}"),
    ]  # fmt: skip
    assert {name for name, _ in found} <= {"ARG", "FROM", "RUN", "LABEL", "USER", "COPY", "ENV", "WORKDIR"}
    commit = next(n for n, (name, text) in enumerate(found) if name == "RUN" and 'test -n "${COMMIT}"' in text)
    label = next(n for n, (name, text) in enumerate(found) if name == "LABEL")
    assert commit < label and 'revision="${COMMIT}"' in found[label][1]
    assert f'version="{ltx_ray.__version__}"' in found[label][1]


def test_it_installs_what_was_measured_and_runs_as_no_root():
    found = instructions()
    runs = [text for name, text in found if name == "RUN"]
    assert any("gcc" in text for text in runs), "Triton needs a compiler"
    (install,) = [text for text in runs if "pip install" in text]
    assert install.startswith('echo "${COMMIT}" >/opt/ltx-ray/ltx_ray/commit.txt && '), "the wheel has it"
    assert "--constraint /opt/ltx-ray/scripts/constraints-gpu.txt" in install and "[hopper,s3]" in install
    assert [text for name, text in found if name == "USER"][-1] == "ray"


def test_only_what_it_needs_is_copied():
    first, *kept = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert first == "*" and kept.pop() == "**/__pycache__"
    paths = [line.removeprefix("!") for line in kept]
    assert all(line.startswith("!") for line in kept) and all((ROOT / path).exists() for path in paths)
    # What the build of the package reads, and what the commands of this folder run.
    assert {"ltx_ray", "jobs", "pyproject.toml", "README.md", "LICENSE", "scripts/constraints-gpu.txt"} == set(paths)


def test_its_versions_are_those_that_are_tested_but_for_torch():
    gpu, tested = pins("constraints-gpu.txt"), pins("constraints.txt")
    assert (gpu["torch"], gpu["fa3-fwd"]) == ("2.11.0", "0.0.3")
    other = {name: version for name, version in gpu.items() if not OF_TORCH.fullmatch(name)}
    assert len(other) > 80
    assert {name: tested.get(name) for name in other} == other
