"""Attention backends: a single key, and the heads that each takes."""

from __future__ import annotations

import pytest
import torch

from ltx_ray.config import GPU_ATTENTION, takes_heads
from ltx_ray.model import attention_backends
from ltx_ray.model.attention_backends import BACKENDS, attention_backend


@pytest.fixture
def without_kernels(monkeypatch):
    """Backends whose kernels refuse to run, as cudnn does for a single key."""

    def refuse(*args, **kwargs):
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(attention_backends, "_sdpa", refuse)
    monkeypatch.setattr(attention_backends, "_fa3", lambda device: refuse)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", BACKENDS)
def test_one_key_gives_its_value_without_a_kernel(name, queries, without_kernels):
    q, k, v = (torch.randn(2, tokens, 3, 8) for tokens in (queries, 1, 1))
    found = attention_backend(name)(q, k, v)
    assert torch.equal(found, v.expand(2, queries, 3, 8))
    with pytest.raises(RuntimeError, match="No available kernel"):
        attention_backend(name)(q, *(torch.randn(2, 2, 3, 8) for _ in range(2)))


def test_one_key_gives_what_softmax_gives():
    q, k, v = (torch.randn(2, tokens, 3, 8) for tokens in (5, 1, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    assert torch.equal(attention_backend("sdpa")(q, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "heads", "on_hopper", "elsewhere"),
    [
        ("cudnn", (128, 64), True, True),
        ("cudnn", (136, 64), True, False),
        ("cudnn", (256, 64), True, False),
        ("cudnn", (264, 64), False, False),
        ("cudnn", (62, 10), False, False),
        ("fa3", (256, 8), True, True),
        ("fa3", (264, 8), False, False),
        ("fa3", (60, 8), False, False),
        ("flash", (62, 10), True, True),
        ("flash", (258, 10), False, False),
        ("sdpa", (1000, 2), True, True),
    ],
)
def test_heads_that_a_backend_takes(name, heads, on_hopper, elsewhere):
    assert (takes_heads(name, heads, True), takes_heads(name, heads, False)) == (on_hopper, elsewhere)


def test_a_replica_refuses_heads_that_its_backend_does_not_take():
    for name in GPU_ATTENTION:
        with pytest.raises(
            RuntimeError, match=f"attention '{name}' does not take heads of 8 and 300 channels; legal: "
        ):
            attention_backend(name, None, (300, 8))
        attention_backend("sdpa", torch.device("cpu"), (300, 8))
