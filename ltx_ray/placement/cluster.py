"""The Ray cluster of a run: the one that was asked for, or a private local one. A run joins it when there is work."""

from __future__ import annotations

import logging
import os
import sysconfig
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltx_ray.checkpoints.checkpoint import Checkpoint
from ltx_ray.checkpoints.digests import writable_cache_root
from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec, RequestedNumerics, RunLimits
from ltx_ray.placement.address import find_cluster
from ltx_ray.placement.first_node import wait_for_first_node
from ltx_ray.placement.gpu_models import Choice, GpuNode, choose_nodes, model_of
from ltx_ray.placement.joined_nodes import JoinedNodes
from ltx_ray.placement.layouts import Cards, choose_layout
from ltx_ray.placement.memory import ROOMY_BYTES, Gpu, can_share, holds_rank, known_gpus
from ltx_ray.placement.node_probe import Attention, choose_attention, nodes_have_fa3
from ltx_ray.placement.numerics import has_fa3, resolve
from ltx_ray.placement.output_pools import Node
from ltx_ray.placement.private_cluster import PrivateCluster, temporary_folder
from ltx_ray.placement.sizing import ParallelConfig, Resources, check_schedulable, lay_out, slots_needed
from ltx_ray.records import first_line

#: A larger checkpoint is rendered on CPUs on request only, because a clip would take days.
_CPU_MODEL_BYTES = 4 * 2**30
#: Object store of a private cluster without GPUs: contexts and latents of a few small clips.
_LOCAL_STORE_BYTES = 512 * 2**20
#: Part of the cluster's object store that the results of a run may fill. The rest holds what calls pass on.
_STORE_SHARE = 0.5
#: Seconds between two looks at a busy cluster.
_WAIT_PERIOD = 5.0


@dataclass(frozen=True)
class Placement:
    """What a run gets on its cluster."""

    pools: list[PoolSpec]
    numerics: Numerics
    #: The largest GPU that a rank may get; None on CPUs, and where the memory of no GPU is known.
    largest_gpu: Gpu | None
    #: The layout, which may have been chosen for the GPUs.
    parallel: ParallelConfig
    #: Ids of the nodes that the run leaves alone: their GPUs are of another model, or they lack FlashAttention-3.
    left_alone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _FreeGpus:
    """The GPUs that a run may use. Of `models`, Ray's names, some or all may be unknown."""

    count: float
    models: tuple[str, ...] = ()
    #: Those of known memory, where any are.
    largest: Gpu | None = None
    smallest: Gpu | None = None
    #: The nodes that have them, and whether no other job has a GPU of any node.
    nodes: tuple[Node, ...] = ()
    alone: bool = True
    #: Ids of the nodes that are left alone, and what is said of them.
    left_alone: frozenset[str] = frozenset()
    told: tuple[str, ...] = ()
    #: Whether all of them have FlashAttention-3.
    fa3: bool = False

    @property
    def on_a_node(self) -> float:
        """Those of the node that has the most."""
        return max((node.gpus for node in self.nodes), default=0.0)


def where_to_run(given: str | None) -> str | None:
    """The address of the cluster that `given` or RAY_ADDRESS names; None for a private one.

    Raises ValueError when no cluster answers there, or when a private one would have no folder for its files.
    """
    address = find_cluster(given)
    if address is None:
        temporary_folder()
    return address


class Cluster:
    """Joins a cluster and lays the pools of one run out on it."""

    def __init__(
        self,
        *,
        address: str | None,
        parallel: ParallelConfig,
        requested: RequestedNumerics,
        checkpoint: Checkpoint,
        model: ModelFiles,
        engines: Callable[[Numerics], Mapping[str, EngineSpec]],
        share_cards: str,
        wait_for_gpus: float = 0.0,
        gpu_model: str | None = None,
        start_timeout: float = RunLimits.start_timeout,
        say: Callable[[str], None] = lambda message: None,
        check_signals: Callable[[], None] = lambda: None,
    ):
        """`address` of a running cluster, as `address.find_cluster` gives it; None for a private one.

        `engines` gives the engines by kind (text, diffusion, decode) for the resolved numerics. `share_cards`: whether
        text and decode may run on the DiT's GPUs: "on" for GPUs with enough memory, "off", or "auto" for "on" in a
        cluster whose GPUs are all free. A gang that fills the cluster shares in any case. `wait_for_gpus`: seconds to
        wait for a cluster on which the pools do not fit yet; `say` is told once that this is so. `gpu_model`: of the
        GPUs to use, as Ray names it. `start_timeout`: seconds in which an autoscaler has to bring a first node.
        `check_signals` raises when the run has been told to stop: importing Ray may have swallowed what a signal's
        handler raised.
        """
        self._address = address
        self._asked = self._parallel = parallel
        self._requested = requested
        self._checkpoint, self._model, self._engines = checkpoint, model, engines
        self._share_cards, self._wait_for_gpus, self.say = share_cards, wait_for_gpus, say
        self._gpu_model, self._start_timeout, self._check_signals = gpu_model, start_timeout, check_signals
        #: By the ids of the nodes that have been asked, whether they have FlashAttention-3.
        self._fa3: dict[str, bool] = {}
        self._joined = False
        #: Those that join while the run is there.
        self._nodes: JoinedNodes | None = None
        self._foreign: set[str] = set()
        self._private = PrivateCluster()

    def join(self) -> Placement:
        """Join or start the cluster. Raises ValueError when the pools do not fit, ConnectionError without an answer."""
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # With Ray's own handler, a signal that comes while the run joins would abort it with a trace of Ray's stack.
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        found, pools, numerics = self._join_running(self._address) if self._address else self._start_private()
        largest = found.largest if numerics.device == "cuda" else None
        for line in found.told:
            self.say(line)
        return Placement(pools, numerics, largest, self._parallel, found.left_alone)

    def store_bytes(self) -> float:
        """Bytes of the object store, as large as it is now, that the results of the run's items may take together."""
        import ray

        return _STORE_SHARE * ray.cluster_resources().get("object_store_memory", float("inf"))

    def new_nodes(self) -> list[Node]:
        """What is free on nodes that have joined since the pools were laid out; nothing for a run that may not grow."""
        return self._nodes.free() if self._nodes is not None and self._asked.may_grow else []

    def foreign_nodes(self, serving: Collection[str]) -> Collection[str]:
        """Ids of nodes that have joined since and whose GPUs the run must not use; each is named once.

        `serving`: ids of the nodes where replicas are ready.
        """
        found = self._nodes.foreign(serving) if self._nodes is not None else {}
        if new := [name for name in found if name not in self._foreign]:
            self._foreign.update(new)
            others = ", ".join(sorted(found[name] for name in new))
            self.say(f"left alone, because their GPUs are not of the model of this run: {others}")
        return self._foreign

    def _join_running(self, address: str) -> tuple[_FreeGpus, list[PoolSpec], Numerics]:
        import ray

        if not ray.is_initialized():
            self._connect(address)
        self._check_signals()
        if self._asked.max_replicas and self._requires_gpus:
            wait_for_first_node(_gpu_nodes, self._gpu_model, self._start_timeout, self.say)
        until, said = time.monotonic() + self._wait_for_gpus, False
        while True:
            self._check_signals()
            try:
                return self._lay_out_on_free()
            except ValueError as busy:
                # Other jobs may end, and nodes may join.
                if time.monotonic() >= until or self._requested.device == "cpu":
                    raise
                if not said:
                    self.say(f"waiting up to {self._wait_for_gpus:g} s for GPUs (--wait-for-gpus): {busy}")
                    said = True
                time.sleep(min(_WAIT_PERIOD, max(until - time.monotonic(), 0.0)))

    @property
    def _requires_gpus(self) -> bool:
        """Whether a cluster without GPUs does not do."""
        return self._requested.device == "cuda" or (
            self._requested.device == "auto" and self._checkpoint.size > _CPU_MODEL_BYTES
        )

    def _lay_out_on_free(self) -> tuple[_FreeGpus, list[PoolSpec], Numerics]:
        """The pools on what is free of the cluster now. Raises ValueError when they do not fit."""
        import ray

        everything = Resources.of(ray.available_resources())
        one_model = self._requested.noise_device != "cpu"
        choice = choose_nodes(_gpu_nodes(), self._gpu_model, one_model)
        attention = self._attention(choice)
        told = tuple(line for line in (choice.told(), attention.told()) if line is not None)
        if attention.fa3:
            choice = choice.without(attention.without)
        free = Resources(
            everything.cpus - sum(node.cpus for node in choice.others),
            everything.gpus - sum(node.gpus for node in choice.others),
        )
        used = {node.model for node in choice.nodes} | ({self._gpu_model} if self._gpu_model else set())
        self._nodes = JoinedNodes(used, binding=one_model or self._gpu_model is not None)
        models = _models(choice.nodes)
        nodes = tuple(Node(node.cpus, node.gpus) for node in choice.nodes if node.gpus)
        alone = sum(node.gpus for node in choice.nodes) >= _whole_gpus(choice.nodes)
        left_alone = frozenset(node.id for node in choice.others)
        found = _FreeGpus(free.gpus, models, *_known_extremes(models), nodes, alone, left_alone, told, attention.fa3)
        # The pools are sized for what is free, so that the run fits beside others.
        try:
            pools, numerics = self._lay_out(found)
            if not self._parallel.max_replicas:
                check_schedulable(pools, free)
        except ValueError as error:
            raise ValueError("; ".join((str(error), *told))) from None
        return found, pools, numerics

    def _attention(self, choice: Choice) -> Attention:
        """Whether the run takes FlashAttention-3, by what its nodes have installed. Each is asked once."""
        if not choice.nodes or self._requested.device == "cpu":
            return Attention(False)
        models, transformer = _models(choice.nodes), self._checkpoint.transformer
        if resolve(self._requested, self._asked, "cuda", models, True, transformer).attention != "fa3":
            return Attention(False)
        self._fa3 |= nodes_have_fa3([node.id for node in choice.nodes if node.id not in self._fa3])
        return choose_attention(choice.nodes, self._fa3, self._requested.attention)

    def _start_private(self) -> tuple[_FreeGpus, list[PoolSpec], Numerics]:
        self._private.prepare()
        self._private.launch()
        found = _local_gpus()  # Imports Ray.
        self._check_signals()
        choose_nodes([GpuNode("", "", model, 1.0, 1.0) for model in found.models], self._gpu_model, one_model=True)
        pools, numerics = self._lay_out(found)
        # A private cluster has as many logical CPUs as its pools ask for.
        slots = Resources(max(slots_needed(pools).cpus, os.cpu_count() or 1), found.count)
        check_schedulable(pools, slots)
        if numerics.device == "cuda":
            writable_cache_root()  # Triton keeps its kernels there.
        address = self._private.start(
            num_cpus=int(slots.cpus) + 1,
            include_dashboard=False,
            object_store_memory=None if found.count else _LOCAL_STORE_BYTES,
        )
        self._connect(address)
        return found, pools, numerics

    def _connect(self, address: str) -> None:
        """Connect to the cluster at `address`. Raises ConnectionError."""
        import ray

        self._joined = True
        try:
            ray.init(address=address, job_config=_job_config(), logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            raise ConnectionError(f"Ray: {address}: {first_line(error)}") from error

    def _lay_out(self, found: _FreeGpus) -> tuple[list[PoolSpec], Numerics]:
        gpus = self._usable_gpus(found.count)
        device = "cuda" if gpus else "cpu"
        transformer = self._checkpoint.transformer
        if gpus:
            self._parallel = self._layout(found, device)
        numerics = resolve(self._requested, self._parallel, device, found.models, found.fa3, transformer)
        # Ray shows what is left of a shared GPU as free, so a cluster with other jobs shares GPUs on request only.
        allowed = self._share_cards == "on" or (self._share_cards == "auto" and found.alone)
        share_cards = allowed and found.smallest is not None and self._can_share(numerics, found.smallest)
        roomy = found.smallest is None or found.smallest.nbytes >= ROOMY_BYTES
        return lay_out(self._parallel, gpus, self._engines(numerics), share_cards, found.nodes, roomy), numerics

    def _layout(self, found: _FreeGpus, device: str) -> ParallelConfig:
        """The layout that the user named, or one that is chosen for the GPUs of a node."""
        transformer, smallest = self._checkpoint.transformer, found.smallest

        def fits(tp: int) -> bool:
            # Ranks that share the tokens need no less than one alone.
            numerics = resolve(
                self._requested, replace(self._asked, tp=tp), device, found.models, found.fa3, transformer
            )
            return smallest is None or holds_rank(self._checkpoint, self._model.in_place(), numerics, smallest, tp)

        cards = Cards(found.models[0] if len(set(found.models)) == 1 else "", int(found.on_a_node))
        return choose_layout(self._asked, cards, transformer, self._model.distilled, fits)

    def _usable_gpus(self, free: float) -> float:
        """GPUs to lay the pools out on; 0 renders on CPUs. Raises ValueError when GPUs are missing."""
        if self._requested.device == "cpu":
            return 0.0
        if free or not self._requires_gpus:
            return min(free, self._parallel.max_gpus or free)
        if not self._parallel.max_replicas:
            raise ValueError("GPUs: at least 1 needed, 0 free; legal: a cluster with GPUs now, or --device cpu")
        return float(self._parallel.max_replicas)  # The autoscaler is going to add them.

    def _can_share(self, numerics: Numerics, gpu: Gpu) -> bool:
        return can_share(self._checkpoint, self._model.in_place(), numerics, gpu)

    def leave(self) -> None:
        """Disconnect from the cluster, and end a private one. Does nothing unless `join` has begun to connect."""
        if self._joined:
            import ray

            ray.shutdown()
        self._private.end()


def _job_config() -> Any:
    """The job of a run on its cluster: workers import this package and nothing from the run's working directory."""
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            # Otherwise Ray has workers look for every module in the driver's working directory first, where a user's
            # av.py would take the place of PyAV.
            return True

    package = str(Path(__file__).resolve().parents[2])
    # A clone need not be installed, while in front of the standard library installed packages would come too early.
    installed = package in sysconfig.get_paths().values()
    return Job.from_json({"py_driver_sys_path": [] if installed else [package]})


def _local_gpus() -> _FreeGpus:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES does not hide."""
    count = _local_gpu_count()
    if not count:
        return _FreeGpus(0.0)
    models = _local_gpu_models()
    # The CPUs of a private cluster are logical, so that a machine has those that the smallest pools need.
    nodes = (Node(float(max(os.cpu_count() or 1, count + 2)), float(count)),)
    return _FreeGpus(float(count), models, *_local_extremes(models), nodes, fa3=has_fa3())


def _local_gpu_count() -> int:
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    present = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present  # A machine without GPUs has none to show, and ranks would wait for them.
    count = 0
    for entry in filter(None, map(str.strip, visible.split(","))):
        if entry == "-1" or (entry.isdecimal() and int(entry) >= present):
            break  # As CUDA does, which takes the entries before the first wrong one.
        count += 1
    return count


def _local_gpu_models() -> tuple[str, ...]:
    """Ray's name of this machine's GPUs; empty when Ray does not know them."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    model = NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()
    return (model,) if model else ()


def _local_extremes(models: Sequence[str]) -> tuple[Gpu | None, Gpu | None]:
    """The largest and the smallest GPU of this machine, hidden ones included, by what the driver reports.

    Which of several GPUs an entry of CUDA_VISIBLE_DEVICES means is known to CUDA alone.
    """
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        sizes = [pynvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles]
        name = next(iter(models), "this machine's GPU")
        return Gpu(name, max(sizes)), Gpu(name, min(sizes))
    except (pynvml.NVMLError, ValueError):
        return _known_extremes(models)


def _known_extremes(models: Collection[str]) -> tuple[Gpu | None, Gpu | None]:
    """The largest and the smallest of the models whose memory is known."""
    known = known_gpus(models)
    return (known[-1], known[0]) if known else (None, None)


def _gpu_nodes() -> list[GpuNode]:
    """The nodes that have GPUs, with what is free of them."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        GpuNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            model_of(node["Resources"]),
            free.get(node["NodeID"], {}).get("GPU", 0.0),
            free.get(node["NodeID"], {}).get("CPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    ]


def _whole_gpus(nodes: Iterable[GpuNode]) -> float:
    """GPUs of these nodes, free or not."""
    import ray

    ids = {node.id for node in nodes}
    return sum(node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["NodeID"] in ids)


def _models(nodes: Sequence[GpuNode]) -> tuple[str, ...]:
    """GPU models of the nodes on which some of a GPU is free; of all nodes when there are none."""
    free = {node.model for node in nodes if node.gpus > 0 and node.model}
    return tuple(sorted(free or {node.model for node in nodes if node.model}))
