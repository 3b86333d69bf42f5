"""`ltx-ray verify`: checks the index against the clips by sha256, and renders a sample again to compare its latents."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ltx_ray.dataset import layout
from ltx_ray.dataset.check import DatasetCheck, Finding, IndexRow
from ltx_ray.dataset.check_scope import CheckedParts, CheckScope
from ltx_ray.dataset.parts import one_line, read_rows
from ltx_ray.dataset.repair import Repair
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.presets import PIPELINES, served_pipelines
from ltx_ray.records import canonical_json, plain
from ltx_ray.run import ExitCode, Options, render
from ltx_ray.storage.images import check_roots
from ltx_ray.storage.lease import Lease
from ltx_ray.storage.locations import parent
from ltx_ray.storage.store import Store


def verify(
    output: str,
    say: Callable[[str], None],
    sample: int = 0,
    repair: bool = False,
    options: Callable[[str, str], Options] | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    *,
    scope: CheckScope = CheckScope(),  # noqa: B008 (frozen)
    read_all: bool = False,
    resume: str | None = None,
) -> int:
    """Check the dataset at `output` and say what is wrong with it, one line per problem; returns their number.

    `sample`: this many rows are rendered again, by `options(manifest, output)` with each row's own dtype, precision and
    noise device; without `repair`, only their clips are checked. `repair`: bad rows and parts are set aside. `on_rows`
    is called with the number of rows that were passed and with how many there are. `scope`: the rows to check.
    `read_all`: clips are read though their store knows their sha256. `resume`: a local file of the parts that an
    earlier call has found well. Raises ValueError when there is no dataset, and for a repair that cannot be written.
    """
    store = Store(output)
    if not any(store.exists(name) for name in (layout.INDEX, layout.RUN_RECORD, layout.SEGMENTS)):
        raise ValueError(f"{store.name}: no dataset; legal: the --output of a run")
    checked = CheckedParts(resume, store.name, scope)
    if checked.parts:
        say(f"resuming: {len(checked.parts)} parts were found well before ({resume})")
    check = DatasetCheck(
        store, sample, sample_alone=bool(sample) and not repair, scope=scope, checked=checked, read_all=read_all,
        on_rows=on_rows,
    )  # fmt: skip
    problems, moved = _check_files(check, say, repair)
    checked.finish()
    if check.clips_without_row:
        say(
            f"note: {check.clips_without_row} clips have no row in the index (a run was interrupted, or is running now)"
        )
    if check.shared_ids:
        say(f"note: {check.shared_ids} rows have the id of another row with other content (of several manifests)")
    if check.pending:
        say(f"note: {check.pending} rows are finished and not yet folded (ltx-ray fold, or the next run)")
    if check.unknown_ids:
        shown = ", ".join(sorted(check.unknown_ids)[:10])
        say(f"note: {len(check.unknown_ids)} ids have no row in the index, such as {shown}")
    if sample:
        assert options is not None
        for finding in _render_again(check.sampled_rows(), options, say):
            problems += 1
            say(str(finding))
    failed = f", {check.failed_rows} rows in failed/" if check.has_other_tables else ""
    say(
        f"{check.rows} rows and {check.clips} clips checked{failed}: "
        + (f"{problems} problems" if problems else "all well")
        + (f", {moved} set aside; ltx-ray render renders their rows again" if moved else "")
    )
    return problems


def _check_files(check: DatasetCheck, say: Callable[[str], None], repair: bool) -> tuple[int, int]:
    """Check all files; the number of problems, and that of the parts and rows that were set aside."""
    problems = moved = 0
    if not repair:
        for part in check.parts():
            for finding in part.findings:
                problems += 1
                say(str(finding))
        return problems, moved
    check.store.check_writable("OUTPUT")
    lease = Lease(check.store, f"verify-{secrets.token_hex(3)}")
    lease.acquire(say)
    try:
        repairing = Repair(check.store, say)
        for part in check.parts():
            if part.findings:
                count, remedy = part.taken_out(repairing)
                problems, moved = problems + len(part.findings), moved + count
                for finding in part.findings:
                    say(str(dataclasses.replace(finding, remedy=remedy)))
        repairing.finish()
    finally:
        lease.release()
    return problems, moved


# --- a sample rendered again ------------------------------------------------------------------------


#: Numerics that an option chooses, and the layout's. A row is rendered again with its own where no option was given.
_CHOSEN = ("attention", "compile")
_LAYOUT = ("tp", "stage2_tp", "guidance_parallel", "sequence_parallel", "stage1_sequence_parallel")


def _render_again(
    sampled: list[tuple[str, IndexRow]], options: Callable[[str, str], Options], say: Callable[[str], None]
) -> Iterator[Finding]:
    """Render (part, row)s once more, each with the numerics of its recipe, and compare what can be compared."""
    model = options("", "").model
    declared, served = {lora.name for lora in model.loras}, served_pipelines(model.distilled)
    comparable = []
    for part, row in sampled:
        missing = {use["name"] for use in row["loras"] or ()} - declared
        named = f"{part} ({row['id']})"
        if row["pipeline"] not in served:
            say(
                f"{named}: not comparable: it was rendered by the pipeline {row['pipeline']}, "
                f"which the given checkpoint does not serve"
            )
        elif missing:
            say(f"{named}: not comparable: it was rendered with LoRAs that are not given ({_names(missing)})")
        elif _recipe_of(row) is None:
            say(f"{named}: not comparable: its recipe, numerics or noise_ledger is damaged")
        else:
            comparable.append(row)
    parts = {row["item_id"]: part for part, row in sampled}
    for recipe, group in itertools.groupby(sorted(comparable, key=lambda row: _recipe_of(row) or ""), _recipe_of):
        numerics, scheme, own = json.loads(recipe or "")
        by_item = {row["item_id"]: row for row in group}
        with tempfile.TemporaryDirectory(prefix="ltx-ray-verify-") as folder:
            manifest, output = os.path.join(folder, "sample.jsonl"), os.path.join(folder, "out")
            with open(manifest, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_manifest_row(row)) + "\n" for row in by_item.values())
            given = options(manifest, output)
            folders = {parent(image["path"]) for row in by_item.values() for image in row["images"] or ()}
            _render_as_then(
                dataclasses.replace(
                    given,
                    numerics=dataclasses.replace(given.numerics, **numerics),
                    scheme=scheme,
                    row_defaults={},
                    save_latents=False,
                    stop_after=None,
                    # Where a folder is gone, that concerns the rows with images in it.
                    image_roots=(*given.image_roots, *filter(_is_root, sorted(folders))),
                ),
                own,
            )
            rendered = {row["id"]: row for row in read_rows(Store(output), layout.INDEX)}
            failed = {row["id"]: row for row in read_rows(Store(output), layout.FAILED)}
        for item_id, row in by_item.items():
            yield from _compare(parts[item_id], row, rendered.get(item_id), failed.get(item_id), say)


def _is_root(folder: str) -> bool:
    try:
        check_roots([folder])
    except ValueError:
        return False
    return True


def _recipe_of(row: IndexRow) -> str | None:
    """What rows have in common that are rendered again together, as JSON; None for a row with damaged records."""
    try:
        recipe, numerics = json.loads(row["recipe"]), json.loads(row["numerics"])
        own = {name: numerics[name] for name in (*_CHOSEN, *_LAYOUT) if name in numerics}
        names = ("dtype", "precision", "noise_device")
        _device(row)
        return canonical_json([{name: recipe[name] for name in names}, recipe.get("scheme", 1), own])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _render_as_then(options: Options, own: dict[str, Any]) -> None:
    """Render with the rows' `own` backends and layout, or as `options` say where that cannot be done here."""
    numerics = {name: own[name] for name in _CHOSEN if name in own and getattr(options.numerics, name) == "auto"}
    default = ParallelConfig()
    parallel = {
        name: own[name] for name in _LAYOUT if name in own and getattr(options.parallel, name) == getattr(default, name)
    }
    then = dataclasses.replace(
        options,
        numerics=dataclasses.replace(options.numerics, **numerics),
        parallel=dataclasses.replace(options.parallel, **parallel),
    )
    try:
        code = render(then)
    except ValueError:
        if then == options:
            raise
        code = ExitCode.ERROR
    if code is ExitCode.ERROR and then != options:
        # Its replicas did not start, as where no node holds a gang of the rows' layout.
        code = render(options)
    if code is ExitCode.DRAINED:
        raise SystemExit(code)


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _compare(
    file: str, row: IndexRow, rendered: IndexRow | None, failed: dict[str, Any] | None, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Compare a row of the part `file` with what it was rendered to again."""
    named = f"{file} ({row['id']})"
    then, now = _device(row), None if rendered is None else _device(rendered)
    if rendered is None:
        why = failed["message"] if failed else "the run ended before it"
        yield Finding(file, row["id"], f"could not be rendered again ({one_line(why)})", "fix that and verify again")
    elif rendered["item_id"] != row["item_id"]:
        other = "other weights or LoRAs" if rendered["recipe_digest"] != row["recipe_digest"] else "other images"
        say(f"{named}: not comparable: it was rendered with {other} than are given now")
    elif rendered["latents_sha256"] == row["latents_sha256"]:
        say(f"{named}: rendered again, the same latents")
    elif (now, rendered["numerics"]) != (then, row["numerics"]):
        if now == then:
            then, now = row["numerics"], rendered["numerics"]
        say(f"{named}: not comparable: it was rendered on {then}, and now on {now}, where bits may differ")
    else:
        problem = f"renders to latents {rendered['latents_sha256']}, the index has {row['latents_sha256']}"
        yield Finding(file, row["id"], problem, "see `versions` of both: a library or a kernel has changed its bits")


def _device(row: IndexRow) -> str:
    """The GPU's model, or "cpu". 0.1.0 wrote cuda:0; where the noise was drawn says the model, if it was on the GPU."""
    if not str(row["device"]).startswith("cuda:"):
        return str(row["device"])
    ledger = json.loads(row["noise_ledger"] or "{}") or {}
    return ledger["device_model"] if ledger.get("device") == "cuda" else "a GPU whose model is not known"


def _manifest_row(row: IndexRow) -> dict[str, Any]:
    """The row of a manifest that renders the same item. Its id is the item_id, since ids of two manifests may clash."""
    # Values that equal the pipeline's defaults are left out: a default may be illegal for a row to ask for, such as a
    # block that a smaller model does not have. The default LoRAs are those that are given now.
    defaults = PIPELINES[row["pipeline"]].defaults
    values = {name: row[name] for name in COLUMNS if row[name] != plain(defaults.get(name))}
    return {**values, "loras": row["loras"] or [], "id": row["item_id"], "prompt": row["prompt"]}
