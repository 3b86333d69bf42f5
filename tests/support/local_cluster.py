"""A Ray cluster of several local nodes, drivers in processes of their own, and checks of what they leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, RequestedNumerics, RunLimits
from ltx_ray.engine.base import Rank
from ltx_ray.engine.fake import FakeEngine, open_gate
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options
from ltx_ray.storage.lease import holder
from ltx_ray.storage.store import Store
from tests.support.passing_time import seconds_in
from tests.support.ray_settings import SYSTEM, quick_node

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelFiles("", "", "", provider="ltx_ray.toy:ensure_toy_model")
FAKE = {name: "ltx_ray.engine.fake:FakeEngine" for name in ("text", "diffusion", "decode")}
SIZE = {"height": 64, "width": 64, "num_frames": 9}
DRIVER = """
import pathlib, pickle, sys
from ltx_ray import run
from ltx_ray.driver import events
events._FLUSH_SECONDS = 0.0  # the tests read the events while the run goes on
if sys.argv[2:]:
    from tests.support.passing_time import let_time_pass, seconds_in
    let_time_pass(setattr, lambda: seconds_in(pathlib.Path(sys.argv[2])))
with open(sys.argv[1], "rb") as file:
    options = pickle.load(file)
sys.exit(run.render(options))
"""
_SYSTEM = {
    **SYSTEM,
    # A dead raylet is noticed within two seconds instead of fifteen.
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4,
    # The toy model's small latents stay on the node that made them, as those of a real clip do.
    "max_direct_call_object_size": 4096,
}  # fmt: skip
#: Seconds after which a test is stuck. They decide nothing else, and a busy machine takes many times as long as an idle
#: one.
HANGS_AFTER = 600.0
#: Files that a run may leave in its output.
_EXPECTED_FILES = re.compile(
    r"(clips|previews)/[0-9a-f]{2}/[0-9a-f]{32}\.mp4|latents/[0-9a-f]{2}/[0-9a-f]{32}\.safetensors"
    r"|dataset\.json|state/(lease\.json|gpu_time\.json|answers\.json|probe)|thumbs/[0-9a-f]{2}/[0-9a-f]{32}\.webp"
    r"|(index|failed|previews)/part-[\w-]+\.parquet|(runs/[^/]+/)?(run\.json|events\.jsonl|report\.html)"
    r"|state/events/[^/]+/(timeline\.json|\d{6}\.jsonl\.zst)|_fake/[\w-]+"
)


def wait_for(condition: Callable[[], T], what: str | Callable[[], str], seconds: float = HANGS_AFTER) -> T:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
    return value


def rows(*prompts: str) -> list[dict]:
    """Manifest rows r0, r1, ... of the smallest size, with different seeds."""
    return [{"id": f"r{n}", "prompt": prompt, "seed": n, **SIZE} for n, prompt in enumerate(prompts)]


class LocalCluster:
    """A head without slots, and `workers` nodes with `slots` logical CPUs each.

    Drivers connect to the head's raylet, so that any worker node may die.
    """

    def __init__(self, workers: int = 3, slots: int = 3, gpus: int = 0):
        """`slots`, `gpus`: logical CPUs and GPUs of each worker."""
        from ray.cluster_utils import Cluster

        self.workers, self.slots, self.gpus = workers, slots, gpus
        self._node = {**quick_node(), "object_store_memory": 80 * 2**20}
        head = {**self._node, "num_cpus": 0, "include_dashboard": False, "_system_config": _SYSTEM}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.heal()

    def nodes(self) -> list[str]:
        """Ids of the living worker nodes."""
        dead = {node["NodeID"] for node in self._cluster.global_state.node_table() if not node["Alive"]}
        return sorted(node.node_id for node in self._cluster.worker_nodes if node.node_id not in dead)

    def add_node(self, model: str | None = None) -> str:
        """Add a node, whose GPUs Ray takes for those of `model`."""
        node = {**self._node, "num_gpus": self.gpus}
        if model is not None:
            node["resources"] = {f"accelerator_type:{model}": 1.0}
        return self._cluster.add_node(num_cpus=self.slots, **node).node_id

    def remove_node(self, node_id: str) -> None:
        """Kill the node's raylet with SIGKILL; returns when the cluster has noticed."""
        node = next(node for node in self._cluster.worker_nodes if node.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain_node(self, node_id: str, seconds: int = 600) -> None:
        """Tell the node to leave once nothing runs there, as a spot notice or `kubectl drain` does."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int((time.time() + seconds) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.address).drain_node(node_id, reason, "told by the test", deadline)
        assert accepted, why

    def heal(self) -> None:
        """Restore the cluster's number of nodes."""
        for _ in range(len(self.nodes()), self.workers):
            self.add_node()
        for node_id in self.nodes()[self.workers :]:
            self.remove_node(node_id)

    def leaks(self, seconds: float = 120) -> list[str]:
        """Actors and placement groups that still exist `seconds` after their runs have ended."""
        end = time.monotonic() + seconds
        while (found := self._alive()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _alive(self) -> list[str]:
        state = self._cluster.global_state
        actors = [a for a in state.actor_table(None).values() if a["State"] != "DEAD"]
        groups = [g for g in state.placement_group_table().values() if g["state"] != "REMOVED"]
        return [f"actor {a['ActorID']} ({a['ActorClassName']}, pid {a['Pid']}) is {a['State']}" for a in actors] + [
            f"placement group {g['placement_group_id']} is {g['state']}" for g in groups
        ]

    def close(self) -> None:
        self._cluster.shutdown()


class Dataset:
    """The output of a run, read back."""

    def __init__(self, folder: Path):
        self.folder = folder

    def index(self) -> dict[str, dict]:
        """Rows that are finished, whether they are folded or not."""
        return self._pending("index") | self.read()

    def read(self) -> dict[str, dict]:
        """Rows that a plain reader of the index sees."""
        return _by_id(self.folder / "index")

    def failed(self) -> dict[str, dict]:
        return _by_id(self.folder / "failed") | self._pending("failed")

    def _pending(self, table: str) -> dict[str, dict]:
        segments = sorted(self.folder.glob(f"state/wal/*/*-{table}.rows"))
        found = [row for path in segments for row in pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()]
        return {row["id"]: row for row in found if row.get("mark") is None}

    def events(self, kind: str, every_run: bool = False) -> list[dict]:
        """Events of the newest run, or of every run."""
        logs = [*sorted(self.folder.glob("runs/*/events.jsonl"))] if every_run else []
        return [e for log in [*logs, self.folder / "events.jsonl"] for e in _events(log) if e["event"] == kind]

    def gangs(self, role: str) -> list[dict]:
        """The `gang_started` events of `role` in the newest run, oldest first."""
        return [event for event in self.events("gang_started") if event["role"] == role]

    def pids(self) -> set[int]:
        """The process ids of every rank of every run."""
        return {rank["pid"] for event in self.events("gang_started", every_run=True) for rank in event["ranks"]}

    def leftovers(self) -> list[str]:
        """Files that are neither part of the dataset nor records of its runs."""
        names = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir())
        return sorted(name for name in names if not _EXPECTED_FILES.fullmatch(name))


def _events(log: Path) -> Iterable[dict]:
    try:
        lines = log.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # truncated by a kill


def _by_id(folder: Path) -> dict[str, dict]:
    found = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len({row["id"] for row in found}) == len(found), f"{folder} has a row twice"
    return {row["id"]: row for row in found}


class Job:
    """Runs of one manifest into one output, each by a driver in a process of its own."""

    def __init__(self, cluster: LocalCluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.out = Dataset(folder / "out")
        self._drivers: list[Driver] = []

    def start(
        self,
        manifest: list[dict] | str,
        *,
        parallel: ParallelConfig = ParallelConfig(tp=2, stage1=1, stage2=1),  # noqa: B008 (frozen)
        limits: RunLimits = RunLimits(),  # noqa: B008 (frozen)
        fake: bool = True,
        dtype: str = RequestedNumerics.dtype,
        device: str = RequestedNumerics.device,
        time_passes: bool = False,
        **options: Any,
    ) -> Driver:
        """Start rendering `manifest`: rows, or the path of a manifest. `time_passes`: for `pass_time`."""
        if not isinstance(manifest, str):
            path = self.folder / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in manifest))
            manifest = str(path)
        if fake:
            options = {"engines": FAKE, **options}
        driver = Driver(
            Options(
                manifest, str(self.out.folder), MODEL, RequestedNumerics(dtype=dtype, device=device), parallel,
                limits=limits,
                ray_address=options.pop("ray_address", self.cluster.address), preflight=options.pop("preflight", False),
                **options,
            ),
            self.folder / f"driver-{len(self._drivers)}",
            time_passes=time_passes,
        )  # fmt: skip
        self._drivers.append(driver)
        return driver

    def until(self, condition: Callable[[], T], what: str) -> T:
        """The first true value of `condition`, which must occur while the newest driver runs."""
        driver = self._drivers[-1]
        wait_for(lambda: condition() or not driver.running, lambda: f"{what}; the driver says:\n{driver.log}")
        value = condition()
        assert value, f"no {what}, and the driver has ended:\n{driver.log}"
        return value

    def open_gate(self, number: str = "") -> None:
        open_gate(str(self.out.folder), number)

    def at_gate(self, stage: str) -> int:
        """On how many ranks calls of `stage` have come to a gate, each row and rank counted once."""
        return len(list(self.out.folder.glob(f"_fake/at-*-{stage}-*")))

    def pass_time(self, seconds: float) -> None:
        """Let time pass for calls and starts of the newest driver's replicas that are under way."""
        self._drivers[-1].pass_time(seconds)

    def check(self, names: Iterable[str], expected: dict[str, str]) -> list[str]:
        """What is wrong with rows, bits, processes and files after the last run. `expected`: latents_sha256 by id."""
        index, failed, wrong = self.out.index(), self.out.failed(), []
        if set(index) | set(failed) != set(names) or set(index) & set(failed):
            wrong.append(f"rows: {sorted(names)} in, index has {sorted(index)} and failed {sorted(failed)}")
        wrong += [f"{n}: other latents" for n, row in index.items() if row["latents_sha256"] != expected[n]]
        for name, row in index.items():
            clip = self.out.folder / row["clip"]
            if not clip.is_file() or hashlib.sha256(clip.read_bytes()).hexdigest() != row["clip_sha256"]:
                wrong.append(f"{name}: its clip is not the one in the index")
        wrong += self.cluster.leaks()
        wrong += [f"process {pid} is still running" for pid in _survivors(self.out.pids())]
        wrong += [f"file {name}" for name in self.out.leftovers()]
        if (held := holder(Store(str(self.out.folder)))) is not None:
            wrong.append(f"run {held.run_id} has not given its lease back")
        return wrong

    def close(self) -> None:
        for driver in self._drivers:
            driver.kill()


def _survivors(pids: set[int], seconds: float = 120) -> set[int]:
    """The processes that do not end within `seconds`."""
    end = time.monotonic() + seconds
    while (left := {pid for pid in pids if _runs(pid)}) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return status != "Z" and b"RankActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _hear_signals() -> None:
    """Processes of a shell's background job, and those below nohup, ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Driver:
    """`ltx-ray render` in a process of its own, without the command line."""

    def __init__(
        self,
        options: Options,
        base: Path,
        *,
        cwd: Path | None = None,
        under: Sequence[str] = (),
        time_passes: bool = False,
    ):
        """`under`: the command that runs the command line, which follows it. `time_passes`: for `pass_time`."""
        self._log, self._passed = base.with_suffix(".log"), base.with_suffix(".passed")
        base.with_suffix(".pickle").write_bytes(pickle.dumps(options))
        self._mark = f"LTX_RAY_CHAOS={base}"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "LTX_RAY_CHAOS": str(base)}
        timed = [str(self._passed)] if time_passes else []
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*under, sys.executable, "-P", "-c", DRIVER, str(base.with_suffix(".pickle")), *timed],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=cwd,
                preexec_fn=_hear_signals,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the calls and the starts of replicas that are under way."""
        self._passed.with_suffix(".new").write_text(str(seconds + seconds_in(self._passed)))
        self._passed.with_suffix(".new").replace(self._passed)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal as `timeout` does: to the driver, and then to its process group."""
        self._process.send_signal(number)
        os.killpg(self._process.pid, number)

    def signal_all(self, number: int) -> None:
        """Send a signal as systemd and Slurm do: to every process that descends from the driver."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float = HANGS_AFTER) -> int:
        """Wait for the driver's end; returns its exit code."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver still runs after {seconds:g} s:\n{self.log}") from None

    def ends(self, code: int, seconds: float = HANGS_AFTER) -> str:
        """Wait for the driver to end with `code`; returns its log."""
        found = self.wait(seconds)
        assert found == code, f"exit {found}, not {code}:\n{self.log}"
        return self.log

    def kill(self) -> None:
        if self.running:
            self._process.kill()
            self._process.wait()

    def processes(self) -> set[int]:
        """The living processes that it has started, directly or not, such as those of a cluster of its own."""
        return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._started(path)}

    def _started(self, environ: Path) -> bool:
        try:
            return f"{self._mark}\0".encode() in environ.read_bytes()
        except OSError:
            return False


def undisturbed(items: dict[str, dict], folder: Path) -> dict[str, str]:
    """latents_sha256 by id that the fake engine computes for rows of the index in an undisturbed run."""
    numerics = Numerics(dtype="float32")
    engine = FakeEngine(EngineSpec("", MODEL, numerics, output=str(folder)), Rank())
    engine.load()
    found = {}
    for name, row in items.items():
        large = "".join(re.findall(r"\[\[\w+:big\]\]", row["prompt"]))
        request = SimpleNamespace(prompt=large)
        item = SimpleNamespace(item_id=row["item_id"], request=request, preflight=False)
        text = engine.run("text", item)
        stage1 = engine.run("stage1", item, text)
        stage2 = engine.run("stage2", item, text, stage1)
        found[name] = engine.run("decode", item, stage1, stage2).latents_sha256
    return found
