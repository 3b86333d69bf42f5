"""The context of a negative prompt on its way from text to stage 1, apart from the item's other conditions."""

from __future__ import annotations

import pickle
from dataclasses import replace

from ltx_ray.records import Conditions, PromptContext


def packed(context: PromptContext) -> bytes:
    """A context as bytes, which a process without torch can pass on."""
    return pickle.dumps(context, protocol=5)


def with_negative(conditions: Conditions, context: bytes | None = None) -> Conditions:
    """The conditions with the context of the negative prompt that `packed` has made; as they are without one."""
    return conditions if context is None else replace(conditions, negative=pickle.loads(context))
