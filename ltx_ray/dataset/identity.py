"""What holds for all rows of a dataset: `dataset.json`, which the first run writes and later ones go by."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ltx_ray.config import NEWEST_SCHEME, Numerics
from ltx_ray.dataset import layout
from ltx_ray.storage.parquet import read_parquet
from ltx_ray.storage.store import Store


@dataclass(frozen=True)
class DatasetIdentity:
    """How a dataset's items are identified, and what else their pixels depend on."""

    #: The scheme of item_ids and of sample seeds (docs/dataset.md#schemes).
    scheme: int = NEWEST_SCHEME
    #: Where noise was drawn: "cpu", or the model of the GPU. None while no clip was begun.
    noise_family: str | None = None
    #: Numerics of the newest run that computed something, as in the column `numerics`.
    numerics: Mapping[str, Any] | None = None
    #: 8 hex digits, in the names of the dataset's parts. None before the first run of this version.
    id: str | None = None
    #: What the file says of the dataset's content (description.py).
    description: Mapping[str, Any] = field(default_factory=dict)


#: The ids of datasets, and what a file that was not written by a run may raise when it is read.
_ID = re.compile(r"[0-9a-f]{8}")
_OWN_FIELDS = frozenset({"format", "id", "scheme", "noise_family", "numerics"})
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)


def read_identity(store: Store) -> DatasetIdentity:
    """The identity of the dataset in `store`.

    A dataset of an older version, which has no `dataset.json`, is known by one of its rows. An output without finished
    rows is new. Raises OSError when the store does not answer, ValueError for a scheme of a newer version.
    """
    try:
        data = store.read_bytes(layout.DATASET)
    except FileNotFoundError:
        data = None
    return _identity_in(store, data)


def scheme_at(output: str | None, retry_seconds: float) -> int:
    """The scheme of the rows at `output`, or the newest where there is none or the store does not answer."""
    if output is None:
        return NEWEST_SCHEME
    try:
        return read_identity(Store(output, retry_seconds)).scheme
    except OSError:
        return NEWEST_SCHEME


def _identity_in(store: Store, data: bytes | None) -> DatasetIdentity:
    """The identity in the content of `dataset.json`, or that of the rows where it has none."""
    try:
        identity = _identity_of_rows(store) if data is None else _parsed(data)
    except _MALFORMED:
        identity = _identity_of_rows(store)
    if not 1 <= identity.scheme <= NEWEST_SCHEME:
        raise ValueError(
            f"{store.name}: its rows have scheme {identity.scheme}, and this version knows none above {NEWEST_SCHEME}; "
            f"legal: a newer version of ltx-ray, or another --output"
        )
    return identity


def _parsed(data: bytes) -> DatasetIdentity:
    """Raises one of _MALFORMED."""
    fields = json.loads(data)
    known = fields.get("id") if isinstance(fields.get("id"), str) and _ID.fullmatch(fields["id"]) else None
    identity = _identity(fields["scheme"], fields.get("noise_family"), fields.get("numerics"))
    return replace(identity, id=known, description={name: fields[name] for name in fields if name not in _OWN_FIELDS})


def _identity(scheme: Any, noise_family: Any, numerics: Any) -> DatasetIdentity:
    """The identity of these values. Raises TypeError for one of another type, such as damage leaves."""
    legal = isinstance(scheme, int) and isinstance(noise_family, str | None) and isinstance(numerics, dict | None)
    if not legal:
        raise TypeError(scheme, noise_family, numerics)
    return DatasetIdentity(scheme, noise_family, numerics)


def dataset_id(store: Store) -> str:
    """The id in the dataset's `dataset.json`, which gets one where it has none. Raises as read_identity does.

    Of several that ask at once, all get the same.
    """
    while True:
        data, version = None, ""
        try:
            data, version = store.read_versioned(layout.DATASET)
        except FileNotFoundError:
            pass
        identity = _identity_in(store, data)
        if identity.id is not None:
            return identity.id
        encoded = _encoded(replace(identity, id=secrets.token_hex(4)))
        if data is None:
            store.create(layout.DATASET, encoded)
        else:
            store.update(layout.DATASET, encoded, version)


def write_identity(store: Store, identity: DatasetIdentity) -> None:
    """Write `dataset.json`."""
    store.write_bytes(layout.DATASET, _encoded(identity))


def _encoded(identity: DatasetIdentity) -> bytes:
    """The first field is the version of the file's own form."""
    fields = {
        "format": 1,
        "id": identity.id,
        "scheme": identity.scheme,
        "noise_family": identity.noise_family,
        "numerics": identity.numerics,
        **identity.description,
    }
    return json.dumps(fields, indent=2, ensure_ascii=False).encode()


def _identity_of_rows(store: Store) -> DatasetIdentity:
    for folder in (layout.INDEX, layout.PREVIEWS):
        for name in filter(layout.is_part, store.list_names(folder)):
            try:
                data = store.read_bytes(f"{folder}/{name}")
                row = read_parquet(data, columns=["recipe", "noise_ledger", "numerics"]).slice(0, 1).to_pylist()[0]
                recipe, ledger = json.loads(row["recipe"]), json.loads(row["noise_ledger"])
                # The recipes of scheme 1 do not name it.
                scheme = recipe.get("scheme", 1 if "checkpoint" in recipe else None)
                if scheme is not None:
                    return _identity(scheme, (ledger or {}).get("device_model"), json.loads(row["numerics"]))
            except (FileNotFoundError, pa.ArrowException, IndexError, *_MALFORMED):
                continue  # A damaged part; another one may be whole.
    return DatasetIdentity()


#: What numerics have where they do not say it (placement.numerics.numerics_json).
_WHERE_LEFT_OUT = {"stage1_sequence_parallel": Numerics.stage1_sequence_parallel}


def changed_numerics(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """`attention fa3 (was cudnn), tp 2 (was 1)`; empty when nothing differs or nothing was before."""
    if before is None:
        return ""
    before, now = {**_WHERE_LEFT_OUT, **before}, {**_WHERE_LEFT_OUT, **now}
    names = [name for name in sorted(now) if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {now[name]} (was {before[name]})" for name in names)


class KeptIdentity:
    """The identity of a run's dataset, which the run checks and keeps up to date. `say` takes lines for the user."""

    def __init__(self, store: Store, say: Callable[[str], None], allow_other_noise: bool = False):
        self._store, self.say, self._allow_other_noise = store, say, allow_other_noise
        self._identity = DatasetIdentity()
        #: Numerics of this run, which the dataset takes over once the run may draw noise.
        self._numerics: Mapping[str, Any] | None = None
        self._draws = False

    def begin(self, scheme: int, wanted: int | None = None) -> None:
        """Read the identity, or lay it down for a new dataset; under the lease.

        `scheme`: that for which rows were planned. `wanted`: one to give the dataset, whatever it has. Raises
        ValueError when the dataset has another scheme than `scheme`.
        """
        identity = read_identity(self._store)
        if wanted is not None:
            identity = replace(identity, scheme=wanted)
        if identity.scheme != scheme:
            raise ValueError(
                f"{self._store.name}: its rows have scheme {identity.scheme}, and the rows of this run were planned "
                f"for scheme {scheme}, because the output did not answer or was new; legal: the same command again"
            )
        self._identity = replace(identity, id=dataset_id(self._store))
        write_identity(self._store, self._identity)

    @property
    def dataset_id(self) -> str:
        assert self._identity.id is not None, "before begin"
        return self._identity.id

    def forget_noise(self) -> None:
        """The dataset has neither clips nor latents, so their noise may be drawn anywhere."""
        self._change(replace(self._identity, noise_family=None))

    def check_noise(self, family: str) -> None:
        """Take in where noise is drawn: "cpu", or the model of the GPU. Raises ValueError when it was elsewhere."""
        before = self._identity.noise_family
        if before not in (None, family) and not self._allow_other_noise:
            same = "--noise-device cpu" if before == "cpu" else f"GPUs of the model {before}"
            raise ValueError(
                f"{self._store.name}: the noise of its clips was drawn on {before}, and this run draws it on {family}, "
                f"which gives other clips for the same rows; legal: {same}, another --output, or --allow-other-noise"
            )
        self._draws = True
        self._change(replace(self._identity, noise_family=before or family))

    def check_numerics(self, numerics: Mapping[str, Any]) -> None:
        """Say in what the run computes otherwise than the one before."""
        if changed := changed_numerics(self._identity.numerics, numerics):
            self.say(f"numerics differ from those of the run before: {changed}")
        self._numerics = numerics
        self._change(self._identity)

    def describe(self, describe: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Replace the description of the dataset's content by what `describe` makes of it."""
        self._change(replace(self._identity, description=describe(self._identity.description)))

    def _change(self, identity: DatasetIdentity) -> None:
        # A run that is refused for its noise computes nothing.
        if self._draws and self._numerics is not None:
            identity = replace(identity, numerics=self._numerics)
        if identity != self._identity:
            self._identity = identity
            write_identity(self._store, identity)
