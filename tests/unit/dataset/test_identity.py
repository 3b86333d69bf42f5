"""dataset.json: the scheme of ids and the noise family of a dataset, old ones included."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ltx_ray.config import NEWEST_SCHEME, Numerics
from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.dataset.identity import DatasetIdentity, KeptIdentity, changed_numerics, read_identity, write_identity
from ltx_ray.placement.numerics import numerics_json
from ltx_ray.planning.identity import recipe_json
from ltx_ray.storage.store import Store
from tests.support.datasets import dataset_writer, finish
from tests.support.results import RENDERED
from tests.support.samples import recipe, request

LEDGER = {"seed": 10, "device": "cuda", "device_model": "NVIDIA H100", "draws": []}


def with_row(store: Store, item_id: str, scheme: int = 1, **changes) -> None:
    values = {"recipe": recipe_json(recipe(scheme=scheme)), "noise_ledger": json.dumps(LEDGER), "numerics": '{"tp": 2}'}
    rendered = dataclasses.replace(RENDERED, **{**values, **changes})
    writer = dataset_writer(store)
    writer.write_index(item_id, request(id=item_id[:4]), rendered)
    finish(writer)
    store.delete("dataset.json")  # which earlier versions did not have


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def test_a_new_output_takes_the_newest_scheme(store):
    assert read_identity(store) == DatasetIdentity(NEWEST_SCHEME, None, None) == DatasetIdentity(2)


@pytest.mark.parametrize("scheme", [1, 2])
def test_a_dataset_without_the_file_is_known_by_a_row(store, scheme):
    store.write_bytes("index/part-broken.parquet", b"no table")
    with_row(store, "a" * 32, recipe="{}")  # A row that says nothing.
    with_row(store, "b" * 32, scheme)
    assert read_identity(store) == DatasetIdentity(scheme, "NVIDIA H100", {"tp": 2})


def test_a_row_that_says_nonsense_says_nothing(store):
    with_row(store, "a" * 32, recipe='{"scheme": "x"}')
    with_row(store, "b" * 32, numerics="[]")
    with_row(store, "c" * 32, noise_ledger='{"device_model": 1}')
    assert read_identity(store) == DatasetIdentity()
    with_row(store, "d" * 32)
    assert read_identity(store).scheme == 1


def test_the_file_goes_before_the_rows(store):
    with_row(store, "a" * 32)
    write_identity(store, DatasetIdentity(2, "cpu", {"tp": 1}))
    assert read_identity(store) == DatasetIdentity(2, "cpu", {"tp": 1})
    assert json.loads(store.read_bytes("dataset.json"))["format"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"scheme": "x"}',
        b"{}",
        b'{"scheme": null}',
        b'{"scheme": 2, "noise_family": 5}',
        b'{"scheme": 2, "numerics": ["tp"]}',
        b'{"scheme": 2, "numerics": "tp 1"}',
    ],
)
def test_a_damaged_file_is_made_up_for_by_the_rows(store, content):
    with_row(store, "a" * 32)
    store.write_bytes("dataset.json", content)
    assert read_identity(store).scheme == 1


def test_a_scheme_of_the_future_is_refused(store):
    store.write_bytes("dataset.json", b'{"format": 1, "scheme": 3}')
    with pytest.raises(ValueError, match="its rows have scheme 3, and this version knows none above 2"):
        read_identity(store)


def test_what_a_run_computes_otherwise():
    one, two = (json.loads(numerics_json(Numerics(stage1_sequence_parallel=n))) for n in (1, 2))
    assert changed_numerics(one, two) == "stage1_sequence_parallel 2 (was 1)"
    assert changed_numerics(two, one) == "stage1_sequence_parallel 1 (was 2)"
    assert changed_numerics(None, {"tp": 1}) == ""
    assert changed_numerics({"tp": 1, "gone": 2}, {"tp": 1, "new": 3}) == ""
    assert changed_numerics({"tp": 1, "attention": "fa3"}, {"tp": 2, "attention": "cudnn"}) == (
        "attention cudnn (was fa3), tp 2 (was 1)"
    )


def kept(store: Store, **options) -> KeptIdentity:
    said: list[str] = []
    identity = KeptIdentity(store, said.append, **options)
    identity.begin(2)
    return identity


def test_rows_that_were_planned_for_another_scheme_are_not_rendered(store):
    with_row(store, "a" * 32)
    with pytest.raises(ValueError, match="its rows have scheme 1, and the rows of this run were planned for scheme 2"):
        kept(store)
    KeptIdentity(store, print).begin(1)
    assert read_identity(store).scheme == 1
    KeptIdentity(store, print).begin(2, wanted=2)


def test_a_dataset_keeps_the_noise_that_its_first_clips_had(tmp_path):
    store = Store(str(tmp_path))
    kept(store).check_noise("NVIDIA H100")
    kept(store).check_noise("NVIDIA H100")
    with pytest.raises(ValueError, match=r"on NVIDIA H100, and this run draws it on cpu, .* GPUs of the model NV"):
        kept(store).check_noise("cpu")
    kept(store, allow_other_noise=True).check_noise("NVIDIA A100")
    assert read_identity(store).noise_family == "NVIDIA H100"
    write_identity(store, DatasetIdentity(noise_family="cpu"))
    with pytest.raises(ValueError, match="legal: --noise-device cpu, another --output, or --allow-other-noise"):
        kept(store).check_noise("NVIDIA H100")


def test_noise_of_which_nothing_is_left_binds_no_later_run(store):
    """A run that ended before its first clip has drawn noise on its GPUs, too."""
    kept(store).check_noise("NVIDIA H100")
    assert not list_existing(store).has_noise
    identity = kept(store)
    identity.forget_noise()
    identity.check_noise("NVIDIA A100")
    assert read_identity(store).noise_family == "NVIDIA A100"


@pytest.mark.parametrize(
    "path, has_noise",
    [
        (f"index/{layout.one_row_part('a' * 32, 'b' * 8)}", True),
        (f"previews/{layout.one_row_part('a' * 32, 'b' * 8)}", True),
        (layout.latents_path("a" * 32), True),
        (f"failed/part-infra-{'a' * 32}-{'b' * 8}.parquet", True),
        (f"failed/part-row-{'a' * 32}-{'b' * 8}.parquet", False),
        (f"failed/part-illegal-{'a' * 32}-{'b' * 8}.parquet", False),
    ],
)
def test_what_may_hold_noise(store, path, has_noise):
    store.write_bytes(path, b"x")
    assert list_existing(store).has_noise is has_noise


def test_a_run_says_in_what_it_computes_otherwise(store):
    said: list[str] = []
    for numerics in ({"tp": 1}, {"tp": 1}, {"tp": 2}):
        identity = KeptIdentity(store, said.append)
        identity.begin(2)
        identity.check_numerics(numerics)
        identity.check_noise("H200")
    assert said == ["numerics differ from those of the run before: tp 2 (was 1)"]
    assert read_identity(store).numerics == {"tp": 2}


def test_a_run_that_is_refused_leaves_its_numerics_nowhere(store):
    for numerics, family in (({"tp": 1}, "cpu"), ({"tp": 2}, "H200")):
        identity = KeptIdentity(store, lambda line: None)
        identity.begin(2)
        if family == "cpu":
            # Noise of the CPU is checked before there is a cluster.
            identity.check_noise(family)
            identity.check_numerics(numerics)
        else:
            identity.check_numerics(numerics)
            with pytest.raises(ValueError, match="the noise of its clips was drawn on cpu"):
                identity.check_noise(family)
        assert read_identity(store).numerics == {"tp": 1}
