"""What holds for all rows of a dataset: `dataset.json`, which the first run writes and later ones go by."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_ray.config import NEWEST_SCHEME
from ltx_ray.dataset import layout
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


def read_identity(store: Store) -> DatasetIdentity:
    """The identity of the dataset in `store`.

    A dataset of an older version, which has no `dataset.json`, is known by one of its rows. An output without finished
    rows is new. Raises OSError when the store does not answer, ValueError for a scheme of a newer version.
    """
    try:
        fields = json.loads(store.read_bytes(layout.DATASET))
        identity = DatasetIdentity(int(fields["scheme"]), fields.get("noise_family"), fields.get("numerics"))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        identity = _identity_of_rows(store)
    if not 1 <= identity.scheme <= NEWEST_SCHEME:
        raise ValueError(
            f"{store.name}: its rows have scheme {identity.scheme}, and this version knows none above {NEWEST_SCHEME}; "
            f"legal: a newer version of ltx-ray, or another --output"
        )
    return identity


def write_identity(store: Store, identity: DatasetIdentity) -> None:
    """Write `dataset.json`. Its first field is the version of its own form."""
    fields = {
        "format": 1,
        "scheme": identity.scheme,
        "noise_family": identity.noise_family,
        "numerics": identity.numerics,
    }
    store.write_bytes(layout.DATASET, json.dumps(fields, indent=2, ensure_ascii=False).encode())


def _identity_of_rows(store: Store) -> DatasetIdentity:
    for folder in (layout.INDEX, layout.PREVIEWS):
        for name in filter(layout.is_part, store.list_names(folder)):
            try:
                data = store.read_bytes(f"{folder}/{name}")
                [row] = pq.read_table(io.BytesIO(data), columns=["recipe", "noise_ledger", "numerics"]).to_pylist()
                recipe, ledger = json.loads(row["recipe"]), json.loads(row["noise_ledger"])
                # The recipes of scheme 1 do not name it.
                scheme = recipe.get("scheme", 1 if "checkpoint" in recipe else None)
                if scheme is not None:
                    return DatasetIdentity(scheme, (ledger or {}).get("device_model"), json.loads(row["numerics"]))
            except (FileNotFoundError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
                continue  # A damaged part; another one may be whole.
    return DatasetIdentity()


def changed_numerics(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """`attention fa3 (was cudnn), tp 2 (was 1)`; empty when nothing differs or nothing was before."""
    if before is None:
        return ""
    names = [name for name in sorted(now) if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {now[name]} (was {before[name]})" for name in names)
