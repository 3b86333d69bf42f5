"""The memory of the GPUs, before anything runs on them: what is refused, and what a refusal says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from ltx_ray import run as runs
from ltx_ray.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ltx_ray.checkpoints.safetensors import TensorInfo
from ltx_ray.checkpoints.transformer_keys import transformer_shapes
from ltx_ray.config import EngineSpec, ModelFiles, Numerics, RequestedNumerics
from ltx_ray.driver.joined_cluster import JoinedCluster
from ltx_ray.manifest.rules import RowProblem
from ltx_ray.model.packing import pack_linears
from ltx_ray.model.transformer import Transformer
from ltx_ray.parallel.collectives import RankGroup
from ltx_ray.placement.cluster import Cluster, Placement, _FreeGpus
from ltx_ray.placement.memory import GIB, Gpu, MemoryBudget, can_share, known_gpus, transformer_bytes
from ltx_ray.placement.numerics import resolve
from ltx_ray.placement.output_pools import Node
from ltx_ray.placement.sizing import ParallelConfig, lay_out
from tests.support.checkpoint_files import RELEASED
from tests.support.datasets import rows_in
from tests.support.samples import request
from tests.support.schedules import WatchedReplicas
from tests.support.simulated_runs import rows, run


def info(shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo("x", "x", "BF16", shape, 0, 2 * math.prod(shape))


REAL_TENSORS = {name: info(shape) for name, shape in transformer_shapes(RELEASED).items()}
CHECKPOINT = Checkpoint("ltx", "2.3.0", RELEASED, REAL_TENSORS, 46 * 10**9)


def budget(gpu: str | Gpu, gpus: float = 2, parallel: ParallelConfig = ParallelConfig(), **numerics) -> MemoryBudget:  # noqa: B008 (frozen)
    """Of the real model on `gpus` GPUs of one kind; with two of them, text and decode have one of their own."""
    resolved = resolve(RequestedNumerics(**numerics), parallel, "cuda", (), False)
    spec = EngineSpec("m:E", ModelFiles("c", "g", "u"), resolved, "out")
    laid_out = lay_out(parallel, gpus, dict.fromkeys(("text", "diffusion", "decode"), spec))
    found = known_gpus([gpu])[0] if isinstance(gpu, str) else gpu
    return MemoryBudget(CHECKPOINT, spec.model, laid_out, resolved, found)


@pytest.fixture(autouse=True)
def real_files(monkeypatch):
    """Sizes of the released upsampler and of Gemma 3 12B's text model, in bfloat16."""
    monkeypatch.setattr(MemoryBudget, "_upsampler_bytes", int(1.0e9))
    monkeypatch.setattr(MemoryBudget, "text_bytes", int(23.5e9))


HD = {"height": 1088, "width": 1920}
#: One that is far too long for a small GPU, with sound that is not.
LONG = dataclasses.replace(request(**HD), num_frames=8001, frame_rate=24.0)


# --- bytes -------------------------------------------------------------------------------------------


def test_the_weights_of_the_real_model():
    assert transformer_bytes(REAL_TENSORS, 1, 2, False) / 1e9 == pytest.approx(38.0, abs=0.1)
    assert transformer_bytes(REAL_TENSORS, 1, 4, False) / 1e9 == pytest.approx(76.0, abs=0.1)
    assert transformer_bytes(REAL_TENSORS, 1, 2, True) / 1e9 == pytest.approx(23.3, abs=0.5)
    assert transformer_bytes(REAL_TENSORS, 8, 2, False) / 1e9 < 7


def held(module: torch.nn.Module, products: bool = False) -> int:
    """Bytes of all storage behind the parameters of `module`, scales of fp8 included."""
    storages = {}
    for name, parameter in module.named_parameters():
        if not products or not re.match(r"transformer_blocks.*(to_|net\.)", name):
            storages[name] = parameter.numel() * 2
    for number, block in enumerate(module.transformer_blocks if products else ()):
        for key, product in block.packed_linears.items():
            for tensor in (product.weight, product.bias, product.row_scale):
                if tensor is not None:
                    storages[number, key, id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_are_those_of_the_model(toy, tp):
    checkpoint = open_checkpoint(toy["checkpoint_path"])
    with torch.device("meta"):
        model = Transformer(checkpoint.transformer, RankGroup(0, tp))
    assert transformer_bytes(checkpoint.tensors, tp, 2, False) == held(model)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_packed_weights_are_those_of_the_fused_path(toy, precision, tp):
    checkpoint = open_checkpoint(toy["checkpoint_path"])
    with torch.device("meta"):
        model = Transformer(checkpoint.transformer, RankGroup(0, tp))
    pack_linears(model, torch.device("cpu"), torch.bfloat16, precision)
    estimate = transformer_bytes(checkpoint.tensors, tp, 2, precision == "fp8")
    # rows of padding beside the gates, which weigh something in a toy only
    assert 0.9 * held(model, products=True) < estimate <= held(model, products=True)


def test_activations_are_those_that_were_measured():
    there, clip = budget("H100"), request(**HD)
    one, fused, plain = there.ranks[0], 2.0, 7.0
    assert one.fused and clip.shape.video_tokens == 32_640 and clip.shape.half().video_tokens == 8_160
    assert fused < there.clip_bytes(one, "stage2", clip) / GIB < fused + 0.7
    assert fused / 4 < there.clip_bytes(one, "stage1", clip) / GIB < fused / 4 + 0.2
    assert plain - 0.2 < there.clip_bytes(replace(one, fused=False), "stage2", clip) / GIB < plain + 0.7


def test_a_clip_counts_with_its_images_and_its_ranks():
    there, clip = budget("H100"), request(**HD)
    one = there.ranks[0]

    def with_images(*frames: int) -> int:
        return there.clip_bytes(
            one, "stage2", replace(clip, images=tuple(SimpleNamespace(frame_idx=f) for f in frames))
        )

    assert with_images() == with_images(0)
    # as much as two latent frames more
    assert with_images(0, 8, 16) == pytest.approx(
        there.clip_bytes(one, "stage2", replace(clip, num_frames=137)), rel=0.01
    )
    alone = replace(one, fused=False)
    shared = replace(alone, sequence_parallel=4)
    assert there.clip_bytes(shared, "stage2", clip) < 0.4 * there.clip_bytes(alone, "stage2", clip)
    assert there.clip_bytes(shared, "stage1", clip) == there.clip_bytes(alone, "stage1", clip)
    assert there.clip_bytes(replace(alone, element_bytes=4), "stage2", clip) > 1.9 * there.clip_bytes(
        alone, "stage2", clip
    )


def test_files_beside_the_transformer(toy, monkeypatch):
    monkeypatch.undo()
    checkpoint, model = open_checkpoint(toy["checkpoint_path"]), ModelFiles(**toy)
    spec = EngineSpec("m:E", model, Numerics(device="cuda"), "out")
    laid_out = lay_out(ParallelConfig(), 1, dict.fromkeys(("text", "diffusion", "decode"), spec))
    there = MemoryBudget(checkpoint, model, laid_out, Numerics(device="cuda"), Gpu("small", 8 * GIB))
    assert 0 < there._upsampler_bytes < 2**20 < 2 * GIB
    assert 0 < there.text_bytes < 2**24
    there.check()
    assert there.problem(request()) is None


# --- GPUs --------------------------------------------------------------------------------------------


def test_known_gpus_come_by_size_and_others_not_at_all():
    assert [gpu.name for gpu in known_gpus(["H200", "L4", "H100"])] == ["L4", "H100", "H200"]
    assert known_gpus(["A100"])[0].nbytes == 80 * GIB, "a name of two sizes is the larger"
    assert known_gpus(["A100", "A100-40G"])[0].nbytes == 40 * GIB
    assert [gpu.name for gpu in known_gpus(["A100", "Intel-GAUDI"])] == ["A100"]
    assert known_gpus(["Intel-GAUDI"]) == known_gpus([]) == []


def test_the_gpus_of_this_machine_by_their_own_account(monkeypatch):
    pynvml = pytest.importorskip("ray._private.thirdparty.pynvml")
    from ltx_ray.placement.cluster import _local_extremes

    def refuse():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    sizes = [8 * GIB, 94 * GIB]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(sizes))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=sizes[handle]))
    assert _local_extremes(("H100",)) == (Gpu("H100", 94 * GIB), Gpu("H100", 8 * GIB))
    assert _local_extremes(())[0] == Gpu("this machine's GPU", 94 * GIB)
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert _local_extremes(("H100",)) == (known_gpus(["H100"])[0],) * 2 and _local_extremes(()) == (None, None)


# --- judgements --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [121, 257])
@pytest.mark.parametrize("gpus", [1, 2])
def test_80_gb_suffice(num_frames, gpus):
    there = budget("H100", gpus)
    there.check()
    assert there.problem(request(**HD, num_frames=num_frames)) is None
    assert budget("A100-80G", gpus).problem(request(**HD, num_frames=num_frames)) is None


def test_40_gb_shared_with_text_and_decode_do_not_hold_bf16_weights():
    with pytest.raises(ValueError) as error:
        budget("A100-40G", 1).check()
    assert re.fullmatch(
        r"A100-40G: the weights, with text and decode beside them, need 6\d\.\d GiB of a GPU, and it has 40\.0 GiB; "
        r"legal: text and decode on another GPU \(--share-cards off where there are several\), --tp 4 or a larger GPU",
        str(error.value),
    )
    with pytest.raises(ValueError, match=r"L4: the weights need 3\d\.\d GiB .* 22.5 GiB; legal: --tp 2 or a larger"):
        budget("L4").check()
    with pytest.raises(ValueError, match=r"A30: the weights need 37.8 GiB .*; legal: --tp 2 or a larger GPU"):
        budget("A30").check()
    with pytest.raises(ValueError, match=r"V100: .*; legal: --tp 2 or a larger GPU"):
        budget("V100").check()


def test_40_gb_suffice_in_fp8():
    bf16, fp8 = budget("A100-40G"), budget("A100-40G", precision="fp8")
    hd = request(**HD)
    bf16.check()  # a small clip would do
    problem = bf16.problem(hd)
    assert problem.column == "num_frames" and problem.value == 121
    assert "or --tp 2 or a larger GPU" in problem.legal
    newer = budget(Gpu("RTX-5000-ADA", 40 * GIB)).problem(hd)
    assert "or --precision fp8, --tp 2 or a larger GPU" in newer.legal
    fp8.check()
    assert fp8.problem(hd) is None and fp8.problem(replace(hd, num_frames=257)) is None


def test_a_row_that_does_not_fit_says_what_does():
    there = budget("A100-40G", precision="fp8")
    problem = there.problem(LONG)
    said = re.fullmatch(
        r"at most (\d+) at 1088x1920 \(1088x1920x8001 needs (\d+\.\d) GiB of a GPU, and A100-40G has 40.0\), "
        r"or a larger GPU",
        problem.legal,
    )
    assert said and problem.column == "num_frames" and problem.value == 8001
    most = int(said[1])
    assert most % 8 == 1 and 257 < most < 2001 and float(said[2]) > 100
    assert there.problem(replace(LONG, num_frames=most)) is None
    assert there.problem(replace(LONG, num_frames=most + 8)) is not None


def test_a_row_of_which_no_frame_fits():
    there = budget("A100-40G", precision="fp8")
    problem = there.problem(request(pipeline="base", height=16_128, width=16_384, num_frames=9))
    assert (problem.column, problem.value) == ("height", 16_128)
    assert problem.legal.startswith("a smaller size than 16128x16384 (16128x16384x9 needs ")


def test_the_neediest_pool_decides():
    wide = budget("H100", 8, ParallelConfig(stage1=1, stage2=1, sequence_parallel=4))
    assert [rank.sequence_parallel for rank in wide.ranks] == [1, 4] and wide.ranks[0].fused
    separate = budget("H100", 8, ParallelConfig(stage1=1, stage2=1, tp=4, stage2_tp=1))
    assert [rank.tp for rank in separate.ranks] == [4, 1]
    assert "--stage2-tp 2 or a larger" in separate.problem(replace(LONG, num_frames=2201)).legal


def test_other_numbers_need_other_memory():
    budget("H200", dtype="float32").check()
    with pytest.raises(ValueError, match=r"H100: .* need 9\d.\d GiB .*; legal: text and decode on"):
        budget("H100", 1, dtype="float32").check()
    assert budget("H200", precision="fp8").problem(replace(LONG, num_frames=1001)) is None


# --- the run -----------------------------------------------------------------------------------------


class Busy(WatchedReplicas):
    def submit(self, replica, stage, item, inputs, timeout):
        assert item.request.num_frames != 8001
        super().submit(replica, stage, item, inputs, timeout)


def joining(driver, problem) -> list:
    """Have `driver` judge rows by `problem` once it has joined; an entry for each time that it joins."""
    join, times = driver._join_cluster, []

    def joined() -> JoinedCluster:
        times.append(1)
        return replace(join(), problem=problem)

    driver._join_cluster = joined
    return times


def table(store, folder: str) -> list[dict]:
    return [
        row for name in store.list_names(folder) for row in pq.read_table(store.path(f"{folder}/{name}")).to_pylist()
    ]


def test_a_row_that_does_not_fit_fails_as_an_illegal_one_and_the_others_render(tmp_path):
    there = budget("A100-40G", precision="fp8")
    long = {"id": "long", "prompt": "a long one", "pipeline": "base", **HD, "num_frames": 8001, "mood": "calm"}
    driver, store = run(tmp_path, [long, *rows(5), {**long, "id": "twin"}], Busy)
    times = joining(driver, there.problem)
    assert driver.run(driver.tracker.plan.open()) is False
    assert len(times) == 1 and not driver.tracker.items
    assert driver.counts["illegal"] == 2 and driver.counts["rendered"] == 5 and driver.counts["rows"] == 7
    assert len(rows_in(store, "index")) == 5
    failed = {row["id"]: row for row in table(store, "failed")}
    assert set(failed) == {"long", "twin"}
    row = failed["long"]
    assert (row["stage"], row["attempts"], row["error_class"]) == ("plan", 0, "row")
    assert re.fullmatch(
        rf"{tmp_path}/m.jsonl:1:num_frames \(long\): 8001, legal: at most \d+ at 1088x1920 \(.*\), or a larger GPU",
        row["message"],
    )
    kept = json.loads(row["manifest_row"])
    assert kept["num_frames"] == 8001 and kept["height"] == 1088 and kept["mood"] == "calm" and "extra" not in kept

    # the same command on larger GPUs
    driver, store = run(tmp_path, [long, *rows(5), {**long, "id": "twin"}])
    driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "index")) == 7 and not rows_in(store, "failed")


@pytest.mark.slow
def test_a_run_of_rows_that_do_not_fit_starts_no_replica(tmp_path):
    class Idle(WatchedReplicas):
        def start(self, name, spec):
            raise AssertionError(name)

    driver, store = run(tmp_path, rows(600), Idle, preflight={"prompt": "preflight"})
    joining(driver, lambda request: RowProblem("num_frames", request.num_frames, "less"))
    assert driver.run(driver.tracker.plan.open()) is False
    assert driver.counts["illegal"] == 600 and len(rows_in(store, "failed")) == 600


def test_an_earlier_failure_of_a_row_that_does_not_fit_is_not_listed_twice(tmp_path):
    driver, store = run(tmp_path, [{"id": "a", "prompt": "x [[stage1:crash]]"}])
    driver.run(driver.tracker.plan.open())
    assert len(rows_in(store, "failed")) == 1
    driver, store = run(tmp_path, [{"id": "a", "prompt": "x [[stage1:crash]]"}])
    joining(driver, lambda request: RowProblem("num_frames", request.num_frames, "less"))
    driver.run(driver.tracker.plan.open())
    assert [row["stage"] for row in rows_in(store, "failed")] == ["plan"]


@pytest.mark.parametrize("device, gpu", [("cpu", Gpu("tiny", GIB)), ("cuda", None), ("cuda", Gpu("tiny", GIB))])
def test_only_gpus_of_known_memory_are_asked(toy, tmp_path, monkeypatch, device, gpu):
    """A run joins its cluster and is refused, or goes on to start replicas."""

    class Reached(Exception):
        pass

    def join(cluster):
        found = _FreeGpus(2.0 if device == "cuda" else 0.0, (), gpu, gpu)
        pools, numerics = cluster._lay_out(found)
        return Placement(pools, numerics, gpu if device == "cuda" else None, cluster._parallel)

    def replica_set(*_):
        raise Reached

    monkeypatch.undo()
    monkeypatch.setattr("ltx_ray.placement.cluster.Cluster.join", join)
    monkeypatch.setattr("ltx_ray.pools.ray_replicas.RayReplicaSet", replica_set)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a cat", "height": 64, "width": 64, "num_frames": 9}\n')
    options = runs.Options(manifest=str(manifest), output=str(tmp_path / "out"), model=ModelFiles(**toy))
    refused = device == "cuda" and gpu is not None
    with pytest.raises(ValueError if refused else Reached) as error:
        runs.render(options)
    assert not refused or str(error.value).startswith("tiny: the weights need 1.5 GiB of a GPU, and it has 1.0 GiB; ")


@pytest.mark.parametrize(
    ("gpu", "changes", "shares"),
    [
        ("H100", {}, True),
        ("H200", {}, True),
        ("A100-40G", {}, False),
        ("A100-40G", {"precision": "fp8"}, False),
        ("A100-40G", {"tp": 4}, False),
        ("L40S", {"precision": "fp8"}, False),
        ("H100", {"dtype": "float32"}, False),
    ],
)
def test_gpus_are_shared_only_where_they_certainly_have_the_memory(gpu, changes, shares):
    parallel = ParallelConfig(tp=changes.pop("tp", 1))
    numerics = resolve(RequestedNumerics(**changes), parallel, "cuda", (), False)
    assert can_share(CHECKPOINT, ModelFiles("c", "g", "u"), numerics, known_gpus([gpu])[0]) == shares


@pytest.mark.parametrize(
    ("mode", "alone", "fits", "dit"),
    [
        ("auto", True, True, 8), ("auto", False, True, 7), ("on", False, True, 8), ("on", True, False, 7),
        ("off", True, True, 7),
    ],
)  # fmt: skip
def test_a_cluster_shares_gpus_when_it_may_and_can(monkeypatch, mode, alone, fits, dit):
    """What is left of a shared GPU looks free to other jobs, so a cluster with other jobs is shared on request only."""
    monkeypatch.setattr("ltx_ray.placement.cluster.can_share", lambda *_: fits)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")
    cluster = Cluster(
        address=None, parallel=ParallelConfig(), requested=RequestedNumerics(device="cuda"), checkpoint=CHECKPOINT,
        model=spec.model, engines=lambda numerics: dict.fromkeys(("text", "diffusion", "decode"), spec),
        share_cards=mode,
    )  # fmt: skip
    [gpu] = known_gpus(["H100"])
    pools, _ = cluster._lay_out(_FreeGpus(8.0, ("H100",), gpu, gpu, alone=alone))
    by_name = {pool.name: pool for pool in pools}
    assert by_name["stage1"].replicas + by_name["stage2"].replicas == dit
    if dit == 8:
        # never text and decode beside the same rank of the DiT
        shares = [by_name[name].gpus_per_rank for name in ("text", "stage1", "decode")]
        assert sum(shares) > 1 and max(shares[0], shares[2]) + shares[1] <= 1


@pytest.mark.parametrize(
    ("gpu", "asked", "flags"),
    [
        ("H100", {}, ""),
        ("A40", {}, ""),
        ("A100-40G", {}, "--tp 2"),
        ("A10G", {}, "--tp 4"),
        ("A100-40G", {"optimize": "latency"}, "--tp 2 --stage1-sequence-parallel 4 --sequence-parallel 4"),
        ("T4", {"tp": 2}, "--tp 2"),
    ],
)
def test_a_layout_that_the_cards_hold_is_chosen(gpu, asked, flags):
    """The numerics and the pools are those of the layout."""
    spec = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")
    cluster = Cluster(
        address=None, parallel=ParallelConfig(**asked), requested=RequestedNumerics(), checkpoint=CHECKPOINT,
        model=spec.model, engines=lambda numerics: dict.fromkeys(("text", "diffusion", "decode"), spec),
        share_cards="off",
    )  # fmt: skip
    [found] = known_gpus([gpu])
    pools, numerics = cluster._lay_out(_FreeGpus(8.0, (gpu,), found, found, (Node(64.0, 8.0),)))
    assert cluster._parallel.flags == flags
    assert numerics.tp == cluster._parallel.tp
    ranks = {pool.ranks for pool in pools if pool.engine.layout.roles and "stage1" in pool.roles}
    assert ranks == {cluster._parallel.ranks[0]}


def test_fp8_is_no_remedy_on_gpus_that_do_not_support_it():
    with pytest.raises(ValueError, match="--precision: 'fp8' on A100-40G, legal: bf16, or GPUs that support fp8"):
        resolve(RequestedNumerics(precision="fp8"), ParallelConfig(), "cuda", ("H100", "A100-40G"), False)
    assert "fp8" not in budget("A100-40G").problem(LONG).legal
    assert "fp8" in budget("L40S").problem(request(**HD, num_frames=401)).legal
