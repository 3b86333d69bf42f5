"""The rank actor: one process of a gang, running whichever engine its spec names.

The actor imports the engine from a dotted path, so this module never imports torch, and a fake engine serves tests
in the same way.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ltx_ray.config import EngineSpec
from ltx_ray.parallel.rendezvous import Rendezvous, listen
from ltx_ray.pools.protocol import OUT_OF_MEMORY
from ltx_ray.records import CallError, CallReport, EngineFacts, ErrorKind
from ltx_ray.stages import Stage
from ltx_ray.storage.requests import REQUESTS


@dataclass(frozen=True)
class RankProcess:
    """Where a rank runs. `node` is Ray's id of the node; `gpus` is CUDA_VISIBLE_DEVICES."""

    pid: int
    node: str
    address: str
    gpus: str


class RankActor:
    """One rank. The class is not decorated, so that tests run it without Ray; `pools.gang` makes actors of it."""

    def __init__(self, hides_gpus: bool = False) -> None:
        """`hides_gpus`: the rank has reserved no GPU, and is to see none."""
        # An environment that Ray sets would take a process of its own, which imports Ray, before each rank. No module
        # that reads these is imported yet.
        os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        if hides_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.engine: Any = None  # as engine.base describes it
        self._start_seconds: dict[str, float] = {}
        self.device = "cpu"
        self._listener: socket.socket | None = None

    def describe(self) -> RankProcess:
        """Where this rank runs."""
        node = ray.get_runtime_context().get_node_id()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return RankProcess(os.getpid(), node, ray.util.get_node_ip_address(), gpus)

    def ping(self) -> None:
        """Return at once. Calls of an actor run in order, so the answer comes after the calls before it."""

    def listen(self) -> int:
        """Begin to listen for the gang's rendezvous, and return the port. Only rank 0 is asked to."""
        self._listener = listen(ray.util.get_node_ip_address())
        return self._listener.getsockname()[1]

    def start(
        self, spec: EngineSpec, rank: int, world: int, rendezvous: Rendezvous | None, timeout: float
    ) -> CallReport:
        """Join the gang and load the engine; the report says how it went. `timeout` of the rendezvous in seconds."""
        report = self._report(lambda: self._start(spec, rank, world, rendezvous, timeout))[0]
        seconds = self._start_seconds | dict(report.facts.start_seconds or {})
        if report.facts.evidence is not None:
            # Calls do not report it again.
            self.engine.facts = dataclasses.replace(self.engine.facts, evidence=None)
        return dataclasses.replace(report, facts=dataclasses.replace(report.facts, start_seconds=seconds))

    def _start(self, spec: EngineSpec, rank: int, world: int, rendezvous: Rendezvous | None, timeout: float) -> None:
        # Imported modules are never freed, and collecting garbage among them takes a sixth of the time of a start.
        gc.disable()
        began = time.perf_counter()
        try:
            base = importlib.import_module("ltx_ray.engine.base")
            module, _, name = spec.engine.partition(":")
            engine = getattr(importlib.import_module(module), name)
            join_gang = getattr(engine, "join_gang", base.join_gang)
            self.device = spec.numerics.device
            imported = time.perf_counter()
            if rendezvous is not None:
                rendezvous = dataclasses.replace(rendezvous, listener=self._listener)
            self.device = join_gang(spec.numerics.device, rank, world, rendezvous, timeout)
            joined = time.perf_counter()
            self._start_seconds = {"import": round(imported - began, 3), "join": round(joined - imported, 3)}
            self.engine = engine(spec, base.Rank(rank, world, self.device))
            self.engine.load()
            if hasattr(engine, "evidence"):
                began = time.perf_counter()
                self.engine.facts = dataclasses.replace(self.engine.facts, evidence=self.engine.evidence())
                self._start_seconds["known answer"] = round(time.perf_counter() - began, 3)
            if hasattr(engine, "begin_warm_up"):
                # Only now, because a warm-up would compete with the known answer, for which the replica waits.
                self.engine.begin_warm_up()
        finally:
            gc.enable()

    def run(self, stage: Stage, item: Any, *inputs: Any) -> tuple[CallReport, Any]:
        """One engine call: (report, payload). The payload of ranks other than 0 is None."""
        return self._report(lambda: self.engine.run(stage, item, *inputs))

    def _report(self, call: Callable[[], Any]) -> tuple[CallReport, Any]:
        started, began = time.time(), time.perf_counter()
        switches = getattr(self.engine, "switches", 0)
        switch_seconds = getattr(self.engine, "switch_seconds", 0.0)
        payload, failure = None, None
        try:
            payload = call()
        except Exception as error:
            failure = _call_error(error)
        facts: EngineFacts = getattr(self.engine, "facts", EngineFacts())
        if facts.start_seconds is not None:
            # A call that fails leaves the facts of the one before, and these would be counted twice.
            self.engine.facts = dataclasses.replace(facts, start_seconds=None)
        report = CallReport(
            seconds=time.perf_counter() - began,
            started=started,
            switches=getattr(self.engine, "switches", 0) - switches,
            switch_seconds=getattr(self.engine, "switch_seconds", 0.0) - switch_seconds,
            device=self.device,
            error=failure,
            nbytes=_nbytes(payload),
            facts=facts,
            requests=REQUESTS.take(),
        )
        return report, payload


def _call_error(error: Exception) -> CallError:
    base = importlib.import_module("ltx_ray.engine.base")
    kind: ErrorKind = base.error_kind(error)
    # A lack of memory has many names: torch's, Python's, and RuntimeErrors of CUDA libraries.
    name = OUT_OF_MEMORY if base.is_out_of_memory(error) else type(error).__name__
    return CallError(kind, name, str(error) or type(error).__name__, traceback.format_exc())


def _nbytes(payload: Any) -> int:
    """Bytes of the tensors in a result."""
    if dataclasses.is_dataclass(payload):
        return sum(_nbytes(getattr(payload, field.name)) for field in dataclasses.fields(payload))
    if isinstance(payload, tuple):
        return sum(map(_nbytes, payload))
    size = getattr(payload, "nbytes", 0)
    return size if isinstance(size, int) else 0
