"""The engines without Ray: from a manifest row to its latents, in one process and with one thread."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ltx_ray.config import EngineSpec, GangLayout, ModelFiles, RequestedNumerics
from ltx_ray.engine.base import Rank
from ltx_ray.engine.decode import named_latents
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.text import TextEngine
from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import LegalRow, RowRules, judge
from ltx_ray.placement.numerics import resolve
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.planning.plan import ItemBuilder
from ltx_ray.presets import served_pipelines
from ltx_ray.records import LoraUse, WorkItem
from ltx_ray.stages import DIFFUSION_STAGES

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ToyPipeline:
    """Text and diffusion engines of one model, for any number of rows."""

    def __init__(self, model: ModelFiles, dtype: str = "float32", compiled: str = "off", precision: str = "bf16"):
        self.model = model
        asked = RequestedNumerics(dtype=dtype, compile=compiled, precision=precision)
        self.numerics = resolve(asked, ParallelConfig(), "cpu", (), False)
        spec = EngineSpec("", model, self.numerics, "", layout=GangLayout(DIFFUSION_STAGES, alternates=True))
        self.text, self.diffusion = TextEngine(spec, Rank()), DiffusionEngine(spec, Rank())
        self.text.load()
        self.diffusion.load()

    def item(self, row: dict) -> WorkItem:
        """The item of a manifest row, whose image paths are relative to the goldens' folder."""
        raw = RawRow(str(GOLDENS / "rows.jsonl"), 1, row)
        loras = tuple(LoraUse(file.name, file.strength) for file in self.model.loras)
        judged = judge(raw, RowRules(pipelines=served_pipelines(self.model.distilled), loras=loras))
        assert isinstance(judged, LegalRow), judged.messages()
        return ItemBuilder(self.model, self.numerics).item(judged.request)

    def latents(self, row: dict) -> dict[str, torch.Tensor]:
        """`stage_1.video` ... `stage_2.audio` of a manifest row."""
        item = self.item(row)
        with one_thread():
            contexts = self.text.run("text", item)
            first = self.diffusion.run("stage1", item, contexts)
            return named_latents(first, self.diffusion.run("stage2", item, contexts, first))


@cache
def toy_pipeline(
    distilled: bool = False, dtype: str = "float32", compiled: str = "off", precision: str = "bf16"
) -> ToyPipeline:
    """The default toy model's engines. The distilled pipeline runs on the same weights without a LoRA."""
    from ltx_ray.toy import ensure_toy_model

    files = ensure_toy_model()
    if distilled:
        files = {**files, "distilled_lora": None}
    return ToyPipeline(ModelFiles(**files, distilled=distilled), dtype, compiled, precision)
