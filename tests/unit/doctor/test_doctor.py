"""What the doctor finds on a node, and what it says of it."""

from __future__ import annotations

import importlib.metadata
import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner

from ltx_ray.cli.app import app
from ltx_ray.doctor import devices, disks, system
from ltx_ray.doctor.checks import Check, at_least
from ltx_ray.doctor.examination import examine
from ltx_ray.storage.store import Store

GPU = {
    "name": "NVIDIA H200", "free": 139 * 2**30, "total": 140 * 2**30, "hopper": True, "products": "",
    "attention": "fa3", "attention_error": "", "kernels": "",
}  # fmt: skip
REPORT = {"torch": "2.11", "cuda": "13.0", "error": "", "gpus": [GPU], "encoder": ""}


def by_name(found) -> dict[str, Check]:
    return {check.name: check for check in found}


def statuses(found) -> dict[str, str]:
    return {check.name: check.status for check in found}


def test_a_check_is_one_line():
    assert Check("ok", "shm", "16 GiB", "8 or more").line() == "ok   shm: 16 GiB; 8 or more"
    assert Check("FAIL", "gpus", "none", "one").line() == "FAIL gpus: none; one"


@pytest.mark.parametrize(("amount", "status"), [(8, "ok"), (7.9, "warn"), (2, "warn"), (1.9, "FAIL")])
def test_an_amount_is_enough_or_little_or_too_little(amount, status):
    assert at_least("cpus", amount, "CPUs", 8, 2, "for x264").status == status


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch):
    assert statuses(system.package_checks()) == {"python": "ok", "packages": "ok"}
    asked = ["numpy>=99", "no-such-package", "fa3-fwd>=0.0.3; extra == 'hopper'", "av>=14"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: asked)
    found = by_name(system.package_checks())["packages"]
    assert found.status == "FAIL" and "no-such-package is missing" in found.value
    assert "where >=99 is required" in found.value and "fa3" not in found.value and "av " not in found.value


def test_limits_of_a_container_count(monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n", "/sys/fs/cgroup/memory.max": "1073741824\n"}
    monkeypatch.setattr(system, "_read", lambda path: files[path])
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda process: set(range(64)))
    assert system.cpus() == 1.5 and system.memory_bytes() == 2**30
    files.update({"/sys/fs/cgroup/cpu.max": "max 100000\n", "/sys/fs/cgroup/memory.max": "max\n"})
    assert system.cpus() == 64 and system.memory_bytes() > 2**30


def test_memory_of_this_process_is_some_of_the_machines(monkeypatch):
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])  # so that it is in memory
    assert len(held) < system.own_memory() < system.memory_bytes()
    monkeypatch.setattr(system, "_read", lambda path: "")
    assert system.own_memory() is None


def test_cpus_and_memory_are_wanted_for_each_gpu(monkeypatch):
    monkeypatch.setattr(system, "cpus", lambda: 32.0)
    monkeypatch.setattr(system.glob, "glob", lambda pattern: ["0", "1", "2", "3", "4"])
    assert by_name(system.system_checks("cuda"))["cpus"].line() == "warn cpus: 32 CPUs; 40 or more, for 5 GPUs"
    assert by_name(system.system_checks("cpu"))["cpus"].status == "ok"


def test_few_open_files_and_no_compiler_are_warned_of(monkeypatch):
    limits = {
        resource.RLIMIT_NOFILE: (1024, 4096),
        resource.RLIMIT_NPROC: (100, 100),
        resource.RLIMIT_MEMLOCK: (-1, -1),
    }
    monkeypatch.setattr(system.resource, "getrlimit", limits.get)
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "/no/compiler")
    found = statuses(system.system_checks("cpu"))
    assert found["open files"] == found["processes"] == found["compiler"] == "warn" and found["locked memory"] == "ok"


# --- devices -------------------------------------------------------------------------------------


def gpu_checks(monkeypatch, gpu=GPU, **changes) -> dict[str, Check]:
    monkeypatch.setattr(devices, "_look", lambda device: {**REPORT, "gpus": [gpu], **changes})
    return by_name(devices.device_checks("cuda"))


def test_a_card_that_works_is_ok(monkeypatch):
    assert {check.status for check in gpu_checks(monkeypatch).values()} == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "status"),
    [
        ({"products": "ArithmeticError: wrong results"}, "gpu 0 products", "FAIL"),
        ({"free": 40 * 2**30}, "gpu 0 memory", "warn"),
        ({"free": 2**30}, "gpu 0 memory", "FAIL"),
        ({"attention": "cudnn"}, "gpu 0 attention", "warn"),
        ({"hopper": False, "attention": "cudnn"}, "gpu 0 attention", "ok"),
        ({"attention_error": "RuntimeError: no kernel"}, "gpu 0 attention", "FAIL"),
        ({"kernels": "RuntimeError: no C compiler"}, "gpu 0 kernels", "warn"),
    ],
)
def test_what_a_card_cannot_do_is_named(monkeypatch, change, name, status):
    found = gpu_checks(monkeypatch, {**GPU, **change})
    assert found[name].status == status
    assert {check.status for other, check in found.items() if other != name} == {"ok"}


def test_a_node_without_a_card_fails_unless_it_needs_none(monkeypatch):
    monkeypatch.setattr(devices, "_look", lambda device: {**REPORT, "gpus": [], "error": ""})
    found = by_name(devices.device_checks("cuda"))
    assert found["driver"].status == found["gpus"].status == "FAIL" and "--device cpu" in found["gpus"].wanted
    assert {check.status for check in devices.device_checks("cpu")} == {"ok"}


def test_a_card_that_ends_the_process_fails_and_the_doctor_goes_on(monkeypatch):
    monkeypatch.setattr(devices.sys, "executable", "/bin/false")
    (found,) = devices.device_checks("cuda")
    assert found.status == "FAIL" and "ended with 1" in found.value


# --- disks and stores ----------------------------------------------------------------------------


def test_an_output_is_tried_and_left_as_it_was(bucket, tmp_path):
    for output in (bucket, str(tmp_path)):
        found = statuses(disks.store_checks(output))
        assert found["output rights"] == found["output creation"] == found["clock"] == "ok"
        assert list(Store(output).names("")) == []


def test_an_output_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").touch()
    (found,) = disks.store_checks(str(tmp_path / "file" / "below"))
    assert found.status == "FAIL" and "cannot be written" in found.value


def test_a_store_that_takes_two_writers_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "refuses_second_create", lambda self, probe: False)
    assert by_name(disks.store_checks(str(tmp_path)))["output creation"].status == "warn"


@pytest.mark.parametrize(("off", "status"), [(0, "ok"), (-60, "warn"), (60, "warn"), (901, "FAIL")])
def test_clocks_are_compared(off, status):
    assert disks._clock(100.5 + off, 100.0, 101.0).status == status


def test_the_cache_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("LTX_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(disks, "_DISK_BYTES", 8 * 10**6)
    assert statuses(disks.cache_checks()).keys() == {"cache space", "cache speed"}
    assert list(Path(tmp_path).iterdir()) == []


# --- the command ---------------------------------------------------------------------------------


def test_a_check_that_breaks_is_a_failure_and_the_others_are_made(monkeypatch):
    monkeypatch.setattr(system, "package_checks", lambda: 1 / 0)
    monkeypatch.setattr(devices, "_look", lambda device: REPORT)
    found = by_name(examine("cpu", None))
    assert found["packages"].value == "ZeroDivisionError: division by zero" and found["encoder"].status == "ok"


def doctor(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["doctor", *words], catch_exceptions=False)
    return found.exit_code, found.stdout


def test_the_exit_code_says_whether_something_failed(monkeypatch):
    monkeypatch.setattr(disks, "_DISK_BYTES", 8 * 10**6)
    code, out = doctor("--device", "cpu", "--json")
    report = json.loads(out)
    failed = [check["name"] for check in report["checks"] if check["status"] == "FAIL"]
    assert (code, report["ok"]) == ((2, False) if failed else (0, True))
    assert {"packages", "cpus", "shm", "cache speed", "torch", "encoder"} <= {c["name"] for c in report["checks"]}
    assert not {"encoder", "torch", "packages"} & set(failed)


def test_without_a_card_the_exit_code_is_2(monkeypatch):
    monkeypatch.setattr(devices, "_look", lambda device: {**REPORT, "gpus": []})
    code, out = doctor()
    assert code == 2 and "FAIL gpus: none; an NVIDIA GPU" in out
