"""The Ray cluster of a run: the one asked for, or a private local one; joined when there is work."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.placement.memory import Gpu, known_gpus
from ltx_ray.placement.numerics import has_fa3, resolve
from ltx_ray.placement.sizing import ParallelConfig, Resources, check_schedulable, lay_out, slots_needed
from ltx_ray.storage.store import Store

#: A larger checkpoint is not rendered on CPUs unless that is asked for: it would take days a clip.
_CPU_MODEL_BYTES = 4 * 2**30
#: Object store of a private cluster without GPUs: contexts and latents of a few small clips.
_LOCAL_STORE_BYTES = 512 * 2**20
#: How much of the cluster's object store the results of a run may fill; the rest is for what is being passed on.
_STORE_SHARE = 0.5
#: How Ray's resources name a node's GPU model.
_MODEL_PREFIX = "accelerator_type:"


class Cluster:
    """`address`: of a running cluster, None for a private one. `engines`: dotted paths by pool kind. `share_cards`:
    "on", "off", or "auto" for private clusters only; `can_share`: whether a GPU has room for that."""

    def __init__(
        self,
        *,
        address: str | None,
        device: str,
        parallel: ParallelConfig,
        numerics: Numerics,
        model: ModelFiles,
        model_bytes: int,
        engines: Mapping[str, str],
        output: str,
        save_latents: bool,
        stop_after: str | None,
        share_cards: str = "off",
        can_share: Callable[[Numerics, Gpu], bool] = lambda numerics, gpu: False,
    ):
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._device, self._parallel, self._numerics = device, parallel, numerics
        self._model, self._model_bytes, self._engines = model, model_bytes, engines
        self._output = Store(output).uri if "://" in output else os.path.abspath(output)
        self._save_latents, self._stop_after = save_latents, stop_after
        self._share_cards, self._can_share = share_cards, can_share
        self._joined = False
        #: What the results of a run's items in flight may take together.
        self.max_bytes = float("inf")
        #: The largest GPU that a rank may get, and the smallest; None where none is known.
        self.gpu: Gpu | None = None
        self._smallest: Gpu | None = None

    def join(self) -> tuple[list[PoolSpec], Numerics]:
        """Join or start the cluster and lay the pools out on it. Raises ValueError when they do not fit."""
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # a signal in the middle of joining should end us, not abort us with a stack of Ray's
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        import ray

        common = {"logging_level": "error", "log_to_driver": False}
        if self._address:
            if not ray.is_initialized():
                _check_reachable(self._address)
                self._joined = True
                ray.init(address=self._address, **common)
            free = Resources.of(ray.available_resources())
            models = _free_gpu_models()
            self.gpu, self._smallest = _known_ends(models)
            # auto takes what is free, so that a run fits beside others
            pools, numerics = self._lay_out(free.gpus, models)
            if not self._parallel.max_replicas:
                check_schedulable(pools, free)
        else:
            gpus = float(_local_gpus())
            models = _local_gpu_models() if gpus else ()
            if gpus:
                self.gpu, self._smallest = _local_gpus_of(models)
            pools, numerics = self._lay_out(gpus, models)
            free = Resources(slots_needed(pools).cpus, gpus)
            check_schedulable(pools, free)
            self._joined = True
            ray.init(
                address="local",
                num_cpus=int(free.cpus) + 1,
                include_dashboard=False,
                object_store_memory=None if gpus else _LOCAL_STORE_BYTES,
                **common,
            )
        self.max_bytes = _STORE_SHARE * ray.cluster_resources().get("object_store_memory", float("inf"))
        return pools, numerics

    def _lay_out(self, gpus: float, gpu_models: Collection[str] = ()) -> tuple[list[PoolSpec], Numerics]:
        wants_gpus = self._device == "cuda" or self._model_bytes > _CPU_MODEL_BYTES
        if self._device == "cpu":
            gpus = 0.0
        elif not gpus and wants_gpus:
            if not self._parallel.max_replicas:
                raise ValueError("GPUs: at least 1 needed, 0 free; legal: a cluster with GPUs now, or --device cpu")
            gpus = float(self._parallel.max_replicas)  # those that the autoscaler is going to bring
        numerics = resolve(replace(self._numerics, device="cuda" if gpus else "cpu"), gpu_models, has_fa3())
        engines = {
            name: EngineSpec(
                engine=path,
                model=self._model,
                numerics=numerics,
                output=self._output,
                save_latents=self._save_latents,
                stop_after=self._stop_after,
            )
            for name, path in self._engines.items()
        }
        # others would take what is left of a shared card for free: a cluster that is not ours is shared on request only
        allowed = self._share_cards == "on" or (self._share_cards == "auto" and not self._address)
        share = allowed and self._smallest is not None and self._can_share(numerics, self._smallest)
        parallel = replace(self._parallel, with_stage2=self._stop_after is None, share_cards=share)
        return lay_out(parallel, gpus, engines), numerics

    def leave(self) -> None:
        if self._joined:
            import ray

            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConnectionError unless something listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", "local" and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"--ray-address: {address}, cannot be reached ({error.strerror or error})") from None


def _local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"])
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


def _local_gpu_models() -> tuple[str, ...]:
    """Ray's name of this machine's GPUs; none when it does not know them."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    model = NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()
    return (model,) if model else ()


def _local_gpus_of(models: Sequence[str]) -> tuple[Gpu | None, Gpu | None]:
    """This machine's largest and its smallest GPU as the driver says: which of several CUDA_VISIBLE_DEVICES means is
    CUDA's to know."""
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        sizes = [pynvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles]
        name = next(iter(models), "this machine's GPU")
        return Gpu(name, max(sizes)), Gpu(name, min(sizes))
    except (pynvml.NVMLError, ValueError):
        return _known_ends(models)


def _known_ends(models: Collection[str]) -> tuple[Gpu | None, Gpu | None]:
    """The largest and the smallest of these models whose memory is known."""
    known = known_gpus(models)
    return (known[-1], known[0]) if known else (None, None)


def _free_gpu_models() -> tuple[str, ...]:
    """The GPU models of the nodes that have some of a GPU free; of all nodes when none has."""
    import ray
    from ray._private.state import available_resources_per_node

    free = [node for node in available_resources_per_node().values() if node.get("GPU", 0.0) > 0]
    return _gpu_models({name for node in free for name in node}) or _gpu_models(ray.cluster_resources())


def _gpu_models(resources: Iterable[str]) -> tuple[str, ...]:
    """The GPU models that a cluster's resources name."""
    return tuple(name.removeprefix(_MODEL_PREFIX) for name in resources if name.startswith(_MODEL_PREFIX))
