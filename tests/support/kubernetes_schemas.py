"""Schemas of Kubernetes' custom resources, as strict ones."""

from __future__ import annotations

from typing import Any


def strict(schema: Any) -> Any:
    """A CRD's openAPIV3Schema as a JSON schema that allows only the listed fields."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        schema = {k: v for k, v in schema.items() if k not in ("anyOf", "type")} | {"type": ["integer", "string"]}
    out = dict(schema)
    if "properties" in out:
        out["properties"] = {key: strict(value) for key, value in out["properties"].items()}
        if "additionalProperties" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if key in out:
            out[key] = strict(out[key])
    return out
