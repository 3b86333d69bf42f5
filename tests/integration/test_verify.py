"""`ltx-ray verify` on a dataset that a run made: a sample is rendered again on real Ray."""

from __future__ import annotations

import re

from ltx_ray.cli.verify import verify
from ltx_ray.config import ModelFiles
from ltx_ray.run import Options
from tests.support.runner import FAKE

TOY = ModelFiles("", "", "", provider="ltx_ray.toy:ensure_toy_model")


def test_a_sample_of_a_run_has_the_same_latents_when_rendered_again(runner):
    rows = [{"id": f"r{n}", "prompt": f"tree {n}", "seed": n, "num_inference_steps": 3, "note": n} for n in range(4)]
    rows.append({**rows[0], "id": "same-clip"})
    assert runner.render(rows) == 0

    def options(manifest: str, output: str) -> Options:
        return Options(manifest, output, TOY, ray_address=runner.cluster, engines=FAKE)

    said: list[str] = []
    assert verify(str(runner.output), said.append, sample=3, options=options) == 0
    assert sum("rendered again, the same latents" in line for line in said) == 3, said
    # With --sample only its rows are checked, and a row that has the clip of one of them.
    assert re.fullmatch(r"(3 rows and 3|4 rows and 4) clips checked: all well", said[-1]), said[-1]
