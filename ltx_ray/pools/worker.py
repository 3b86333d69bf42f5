"""The rank actor: one process of a gang, running whichever engine its spec names.

The engine is imported from a dotted path inside the actor, so this module never imports torch, and a
fake engine slips in the same way.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import socket
import time
import traceback
from typing import Any

import ray

from ltx_ray.config import EngineSpec
from ltx_ray.records import CallReport, ReplicaError, RowError, WrongDevice


class RankActor:
    """One rank. Not decorated, so that it can be tested without Ray; `pools.gang` makes actors of it."""

    def __init__(self) -> None:
        self.engine: Any = None  # with load(), run(stage, item, *inputs) and `info`, small facts of the last run
        self.device = "cpu"

    def describe(self) -> dict[str, Any]:
        """Where this rank runs: pid, node id, address, device."""
        context = ray.get_runtime_context()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return {
            "pid": os.getpid(),
            "node": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpus": gpus,
        }

    def ping(self) -> None:
        """Answers when it is this call's turn."""

    def free_port(self) -> int:
        """A port on this node for the gang's rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, spec: EngineSpec, rank: int, world: int, rendezvous: tuple[str, int] | None, timeout: float):
        """Join the gang and load the engine; the CallReport says how it went."""
        return self._report(lambda: self._start(spec, rank, world, rendezvous, timeout))[0]

    def _start(
        self, spec: EngineSpec, rank: int, world: int, rendezvous: tuple[str, int] | None, timeout: float
    ) -> None:
        # what is imported stays: looking for garbage among it takes a sixth of the time
        gc.disable()
        try:
            base = importlib.import_module("ltx_ray.engine.base")
            module, _, name = spec.engine.partition(":")
            engine = getattr(importlib.import_module(module), name)
            join = getattr(engine, "join", base.join)
            self.device = spec.numerics.device
            self.device = join(spec.numerics.device, rank, world, rendezvous, timeout)
            self.engine = engine(spec, base.Rank(rank, world, self.device))
            self.engine.load()
        finally:
            gc.enable()

    def run(self, stage: str, item: Any, *inputs: Any) -> tuple[CallReport, Any]:
        """One engine call: (report, payload). The payload of ranks other than 0 is None."""
        return self._report(lambda: self.engine.run(stage, item, *inputs))

    def _report(self, call: Any) -> tuple[CallReport, Any]:
        started, began = time.time(), time.perf_counter()
        switches = getattr(self.engine, "switches", 0)
        switch_seconds = getattr(self.engine, "switch_seconds", 0.0)
        payload, failure = None, {}
        try:
            payload = call()
        except Exception as error:
            memory = importlib.import_module("ltx_ray.engine.base").is_out_of_memory(error)
            failure = {
                "ok": False,
                "error_type": "OutOfMemoryError" if memory else type(error).__name__,
                "infrastructure": memory or isinstance(error, OSError | WrongDevice),
                "message": str(error) or type(error).__name__,
                "traceback": traceback.format_exc(),
                "row_error": isinstance(error, RowError),
                "replica_error": isinstance(error, ReplicaError),
            }
        return (
            CallReport(
                ok=not failure,
                seconds=time.perf_counter() - began,
                started=started,
                switches=getattr(self.engine, "switches", 0) - switches,
                switch_seconds=getattr(self.engine, "switch_seconds", 0.0) - switch_seconds,
                device=self.device,
                **{k: v for k, v in failure.items() if k != "ok"},
                nbytes=_nbytes(payload),
                info=dict(getattr(self.engine, "info", {})),
            ),
            payload,
        )


def _nbytes(payload: Any) -> int:
    """Bytes of the tensors in a result."""
    if dataclasses.is_dataclass(payload):
        return sum(_nbytes(getattr(payload, field.name)) for field in dataclasses.fields(payload))
    if isinstance(payload, tuple):
        return sum(map(_nbytes, payload))
    size = getattr(payload, "nbytes", 0)
    return size if isinstance(size, int) else 0
