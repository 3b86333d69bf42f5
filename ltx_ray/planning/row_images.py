"""The images of rows, which are read while rows are planned, and rows whose images cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ltx_ray.manifest.raw import RawRow
from ltx_ray.manifest.rules import resolved_values
from ltx_ray.planning.image_lookahead import Use
from ltx_ray.records import RenderRequest
from ltx_ray.storage.images import check_image, image_digest
from ltx_ray.storage.retry import StoreUnavailable, is_permanent


class _ImageError(Exception):
    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class UnreadableImage(_ImageError):
    """A conditioning image of a row is missing, may not be read, or cannot be used."""


class ImageOutOfReach(_ImageError):
    """The store of a row's image does not answer. Nothing is known of the image."""


@dataclass(frozen=True)
class UnreadRow:
    """A legal row that cannot be planned now, because the store of its image does not answer."""

    #: As a plan counts it, beside the statuses of a PlannedRow.
    status: ClassVar[str] = "unread"

    #: With its defaults resolved.
    raw: RawRow
    message: str

    @classmethod
    def of(cls, raw: RawRow, request: RenderRequest, error: ImageOutOfReach) -> UnreadRow:
        return cls(
            raw=raw._replace(values=resolved_values(request)),
            message=f"{raw.source}:images: {error.path} cannot be read now ({error.reason})",
        )

    @property
    def id(self) -> str | None:
        value = self.raw.values.get("id")
        return value if isinstance(value, str) else None


def images_of(request: RenderRequest) -> tuple[Use, ...]:
    return tuple((image.path, image.crf or 0) for image in request.images)


def digest_of_image(path: str, crf: int = 0) -> str:
    """The digest of an image that can be used. Raises UnreadableImage and ImageOutOfReach."""
    try:
        check_image(path, crf)
        return image_digest(path)
    except ValueError as error:
        raise UnreadableImage(path, str(error)) from None
    except OSError as error:
        passes = isinstance(error, StoreUnavailable) or not is_permanent(error)
        raise (ImageOutOfReach if passes else UnreadableImage)(path, str(error)) from None
