"""The `ltx-ray` command."""

from ltx_ray.cli.app import main

__all__ = ["main"]
