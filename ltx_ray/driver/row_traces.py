"""OpenTelemetry traces of rows: a span for each clip from its first call to its end, and one in it for each call.

They are made of the run's events, so that nothing is measured for them. The id of a clip's trace is its `item_id`, by
which a backend finds it. Where they go is said by OpenTelemetry's own variables, such as OTEL_EXPORTER_OTLP_ENDPOINT.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from typing import Any

from ltx_ray.records import first_line

#: What `ltx-ray[otel]` installs beside Ray's own packages.
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_NANOSECONDS = 1_000_000_000


def check_traces() -> None:
    """Raises ValueError where the package that sends traces is missing."""
    try:
        found = util.find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ValueError(
            "--trace: needs opentelemetry-exporter-otlp-proto-http; legal: after pip install 'ltx-ray[otel]'"
        )


class RowTraces:
    """Takes a run's events. It keeps the calls of clips that have not ended, and nothing else."""

    def __init__(self, run: str, say: Callable[[str], None], exporter: Any = None):
        """`say` is told once when spans cannot be sent. `exporter`: a SpanExporter; None for OTLP's over HTTP."""
        # These packages take a tenth of a second, which a run without traces does not pay.
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
            # It logs each failure, some with tracebacks.
            logging.getLogger(_EXPORTER).setLevel(logging.CRITICAL)

        class ItemIds(RandomIdGenerator):
            trace_id = 1

            def generate_trace_id(self) -> int:
                return self.trace_id

        class Saying(SpanExporter):
            said = False

            def export(self, spans: Sequence[Any]) -> SpanExportResult:
                try:
                    result = exporter.export(spans)
                    why = "they were refused, or nobody answered"
                except Exception as error:
                    result, why = SpanExportResult.FAILURE, first_line(error)
                if result is not SpanExportResult.SUCCESS and not self.said:
                    self.said = True
                    say(f"--trace: spans could not be sent ({why}); the run goes on without them")
                return result

            def shutdown(self) -> None:
                exporter.shutdown()

        self._ids = ItemIds()
        resource = Resource.create({"service.name": "ltx-ray", "ltx_ray.run": run})
        provider = TracerProvider(resource=resource, id_generator=self._ids)
        # What has not been sent by then is sent when the process ends.
        self._sender = BatchSpanProcessor(Saying())
        provider.add_span_processor(self._sender)
        self._tracer = provider.get_tracer("ltx_ray")
        self._calls: dict[str, list[Mapping[str, Any]]] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in an event: a call, or the end of a row."""
        kind = event["event"]
        if kind == "call":
            self._calls.setdefault(str(event["item_id"]), []).append(event)
        elif kind in ("item_finished", "item_failed"):
            # The other rows of an item end without calls of their own.
            if calls := self._calls.pop(str(event["item_id"]), None):
                self._send(calls, event)

    def _send(self, calls: list[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context

        self._ids.trace_id = int(str(end["item_id"]), 16)
        began = min(call["start"] for call in calls)
        row = self._tracer.start_span("row", context=Context(), start_time=_time(began))
        row.set_attributes({"ltx_ray.item_id": str(end["item_id"]), "ltx_ray.id": str(end["id"])})
        if end["event"] == "item_failed":
            row.set_status(trace.StatusCode.ERROR, str(end["message"]))
        inside = trace.set_span_in_context(row)
        for call in calls:
            span = self._tracer.start_span(str(call["stage"]), context=inside, start_time=_time(call["start"]))
            span.set_attributes({"ltx_ray.replica": str(call["replica"]), "ltx_ray.pool": str(call["role"])})
            if not call["ok"]:
                span.set_status(trace.StatusCode.ERROR)
            span.end(_time(call["start"] + call["seconds"]))
        row.end(_time(max(end["t"], *(call["start"] + call["seconds"] for call in calls))))


def _time(seconds: float) -> int:
    return int(seconds * _NANOSECONDS)
