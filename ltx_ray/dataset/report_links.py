"""Links of the report to clips and pictures: relative, or signed by an object store for some time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ltx_ray.dataset import layout
from ltx_ray.storage.store import Store

#: Most clips of a list with signed links, of which the page holds some 300 bytes more for each.
MAX_SIGNED = 20_000


@dataclass(frozen=True)
class SignedLinks:
    """URLs that need no credentials until they expire, by path below the output."""

    urls: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Scheme and host of the URLs, as the page's policy names them; "" when there are none."""
        for url in self.urls.values():
            parts = urlsplit(url)
            return f"{parts.scheme}://{parts.netloc}"
        return ""

    def of_list(self, items: Sequence[str]) -> dict[str, Any] | None:
        """What the list's script makes the URLs of `items` from; None when there are no signed ones.

        They have most of their text in common, and 100,000 whole ones would be a page of 60 MB.
        """
        if not self.urls:
            return None
        parts = {
            folder: [self.urls.get(path_of(item), "").partition("?") for item in items]
            for folder, path_of in ((layout.CLIPS, layout.clip_path), (layout.THUMBS, layout.thumb_path))
        }
        queries = [found[2] for column in parts.values() for found in column if found[2]]
        query = os.path.commonprefix(queries)  # noqa: RUF071
        path, url = next(iter(self.urls.items()))
        return {
            "base": url.partition("?")[0].removesuffix(path),
            "query": f"?{query}",
            **{folder: [found[2][len(query) :] for found in column] for folder, column in parts.items()},
        }


def sign_links(store: Store, paths: Sequence[str], seconds: float) -> SignedLinks:
    """Sign URLs of files in the output. Raises ValueError for a local one, OSError without credentials."""
    if store.is_local:
        raise ValueError(f"--presign: {store.name}, is a local folder; legal: an output in an object store, or --serve")
    return SignedLinks(dict(zip(paths, store.signed_urls(paths, seconds), strict=True)))
