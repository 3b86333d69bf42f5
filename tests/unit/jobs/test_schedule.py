"""jobs/schedule.py without Ray: one recipe and date always give the same manifest and id."""

import dataclasses
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[3]


def load_schedule():
    spec = importlib.util.spec_from_file_location("schedule", ROOT / "jobs/schedule.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["schedule"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


schedule = load_schedule()
import schedule_recipe  # on the path once schedule.py is loaded

DATE = "2026-11-23"
RECIPE = """
name: night
output: /data/{name}/{date}
prompts: ["a {animal} in {place}", "just {animal}", "plain {{braces}}"]
variables: {animal: [fox, owl, 7], place: [snow, "heavy rain"]}
"""


def rows(text, date=DATE, folder="."):
    return [
        json.loads(line)
        for line in schedule.plan(schedule.parse_recipe(text, str(folder)), date, "/m", "render").manifest.splitlines()
    ]


def test_templates_expand_to_every_combination():
    prompts = [row["prompt"] for row in rows(RECIPE)]
    assert prompts == [
        "a fox in snow",
        "a fox in heavy rain",
        "a owl in snow",
        "a owl in heavy rain",
        "a 7 in snow",
        "a 7 in heavy rain",
        "just fox",
        "just owl",
        "just 7",
        "plain {braces}",
    ]


def test_a_row_has_id_seed_defaults_and_what_made_it():
    first = rows(RECIPE + "defaults: {height: 512, images: [{path: a.png, frame_idx: 0, strength: 1.0}]}")[0]
    assert first["id"] == "night-2026-11-23-0001"
    assert first["height"] == 512 and first["images"][0]["path"] == "a.png"
    assert first["variables"] == {"animal": "fox", "place": "snow"}
    assert 0 <= first["seed"] < 2**32


def test_same_recipe_and_date_same_bytes_and_id():
    # These values are fixed: a change would make existing schedules render their date again.
    recipe = schedule.parse_recipe(RECIPE + "count: 3\nseed: 5")
    job = schedule.plan(recipe, DATE, "/m", "render")
    assert job == schedule.plan(recipe, DATE, "/m", "render")
    assert job.rows == 3
    assert job.manifest_path == "/m/night-2026-11-23.jsonl"
    assert job.submission_id == "night-2026-11-23-51049d328049"
    assert job.entrypoint == "render /m/night-2026-11-23.jsonl --output /data/night/2026-11-23"


def test_the_sample_and_the_seeds_change_with_date_and_seed():
    one, two = (RECIPE + f"count: 4\nseed: {seed}" for seed in (1, 2))
    runs = [rows(one), rows(one, "2026-11-24"), rows(two)]
    assert len({tuple(r["prompt"] for r in run) for run in runs}) == 3
    assert len({r["seed"] for run in runs for r in run}) == 12
    assert all(len({r["prompt"] for r in run}) == 4 for run in runs)


@pytest.mark.parametrize(("total", "count"), [(1, 1), (10, 10), (10, 3), (10**12, 50)])
def test_sample_is_without_repeats_and_in_range(total, count):
    got = schedule_recipe.sample(total, count, "key")
    assert got == sorted(set(got)) and len(got) == count and got[0] >= 0 and got[-1] < total


def test_sample_is_fair():
    hits = [0] * 10
    for key in range(2000):
        for i in schedule_recipe.sample(10, 3, key):
            hits[i] += 1
    assert all(500 < n < 700 for n in hits), hits  # 600 expected, sigma about 20


def test_defaults_can_fix_the_seed():
    assert {row["seed"] for row in rows(RECIPE + "defaults: {seed: 10}")} == {10}


def test_id_depends_on_the_manifest_and_the_render_options_only(tmp_path):
    def ident(text, out_dir="/m", command="render"):
        return schedule.plan(schedule.parse_recipe(text), DATE, out_dir, command).submission_id

    base = ident(RECIPE)
    assert base == ident(RECIPE, str(tmp_path), "wrapper render")
    assert len({base, ident(RECIPE + "render_options: [--tp, 2]"), ident(RECIPE + "seed: 1")}) == 3
    assert ident(RECIPE.replace("/data", "/other")) != base


def test_render_options_are_quoted_for_the_shell():
    recipe = schedule.parse_recipe(RECIPE + "render_options: [--lora, /a b/x.safetensors, 0.5, '$(rm)']")
    words = shlex.split(schedule.plan(recipe, DATE, "/m n", "python r.py").entrypoint)
    assert words == [
        *("python", "r.py", "/m n/night-2026-11-23.jsonl", "--output", "/data/night/2026-11-23"),
        *("--lora", "/a b/x.safetensors", "0.5", "$(rm)"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_rows_are_drawn_from_a_manifest(tmp_path, kind):
    pool = [
        {"id": "one", "prompt": "first", "seed": 3, "height": None, "tag": "x"},
        {"id": "two", "prompt": "second", "seed": None, "height": 512, "tag": None},
    ]
    if kind == "jsonl":
        name = "pool.jsonl"
        (tmp_path / name).write_text("\n\n".join(json.dumps(row) for row in pool) + "\n")
    else:
        name = "pool.parquet" if kind == "parquet" else "pool"
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
            path /= "part-0.parquet"
        pq.write_table(pa.Table.from_pylist(pool), path)
    got = rows(f"name: n\noutput: /o\nmanifest: {name}\ndefaults: {{height: 256}}", folder=tmp_path)
    assert got[0] == {
        "id": "n-2026-11-23-0001",
        "height": 256,
        "prompt": "first",
        "seed": 3,
        "tag": "x",
        "source_id": "one",
    }
    assert got[1]["height"] == 512 and got[1]["source_id"] == "two" and "tag" not in got[1]
    assert got[1]["seed"] not in (None, 3)


def test_templates_and_a_manifest_make_one_pool(tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"prompt": "drawn"}\n')
    text = RECIPE + "manifest: pool.jsonl\n"
    assert [r["prompt"] for r in rows(text, folder=tmp_path)][-2:] == ["plain {braces}", "drawn"]
    assert len(rows(text + "count: 11", folder=tmp_path)) == 11


def test_images_of_a_drawn_row_stay_findable(tmp_path):
    images = [{"path": "img/a.png"}, {"path": "/abs/b.png"}, {"path": "s3://b/c.png"}]
    (tmp_path / "pool.jsonl").write_text(json.dumps({"prompt": "p", "images": images}) + "\n")
    recipe = schedule.parse_recipe("name: n\noutput: /o\nmanifest: pool.jsonl", str(tmp_path))
    job = schedule.plan(recipe, DATE, "/m", "render")
    paths = [image["path"] for image in json.loads(job.manifest)["images"]]
    assert paths == [f"{tmp_path}/img/a.png", "/abs/b.png", "s3://b/c.png"]
    assert shlex.split(job.entrypoint)[-2:] == ["--image-root", str(tmp_path)]


def test_any_script_stays_readable_in_the_manifest():
    recipe = schedule.parse_recipe("name: n\noutput: /o\nprompts: ['雪の狐 🦊']")
    assert "雪の狐 🦊".encode() in schedule.plan(recipe, DATE, "/m", "render").manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "recipe.*mapping"),
        ("name: [", "not YAML"),
        ("output: /o\nprompts: [p]", "name: None, must be given"),
        ("name: n\nprompts: [p]", "output: None, must be given"),
        ("name: a/b\noutput: /o\nprompts: [p]", "name: 'a/b'.*letters"),
        (f"name: {'n' * 65}\noutput: /o\nprompts: [p]", "1 to 64"),
        ("name: n\noutput: /o/{day}\nprompts: [p]", r"output: \{day\}.*known: \{date\}, \{name\}"),
        ("name: n\noutput: /o\nprompts: [p]\npromts: [q]", "unknown field: 'promts'.*prompts"),
        ("name: n\noutput: /o", "prompts: .*or `manifest`"),
        ("name: n\noutput: /o\nprompts: p", "prompts: 'p'.*list"),
        ("name: n\noutput: /o\nprompts: [' ']", "prompts.*not blank"),
        ("name: n\noutput: /o\nprompts: ['a {x}']", r"prompts\[0\]: \{x\}.*none are defined"),
        ("name: n\noutput: /o\nprompts: ['a {x.y}']\nvariables: {x: [1]}", r"\{x.y\}.*known: \{x\}"),
        ("name: n\noutput: /o\nprompts: ['a {x!r:>3}']\nvariables: {x: [1]}", r"\{x!r:>3\}"),
        ("name: n\noutput: /o\nprompts: ['a {']", "literal brace"),
        ("name: n\noutput: /o\nprompts: [p]\nvariables: {x: [1]}", "variables: 'x'.*used"),
        ("name: n\noutput: /o\nprompts: ['{x}']\nvariables: {x: []}", r"variables.x: \[\]"),
        ("name: n\noutput: /o\nprompts: [p]\ncount: 0", "count: 0"),
        ("name: n\noutput: /o\nprompts: [p]\ncount: true", "count: 'true', must be a whole number"),
        ("name: n\noutput: /o\nprompts: [p]\ncount: 2", "count: 2, must be at most 1"),
        ("name: n\noutput: /o\nprompts: [p]\nseed: -1", "seed: -1"),
        ("name: n\noutput: /o\nprompts: [p]\ndefaults: {heigth: 1}", "defaults: 'heigth'.*height"),
        (
            "name: n\noutput: /o\nprompts: [p]\ndefaults: {height: .nan}",
            "defaults.height: '.nan', must be a positive multiple of 64 .line 4",
        ),
        (
            "name: n\noutput: /o\nprompts: [p]\nrender_options: [--output=x]",
            "render_options.*without --output",
        ),
        ("name: n\noutput: /o\nprompts: [p]\nrender_options: {tp: 2}", "render_options.*list"),
        ("name: n\noutput: /o\nmanifest: nowhere.jsonl", "manifest: '/.*nowhere.jsonl'.*readable"),
    ],
)
def test_bad_recipes_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        rows(text)


def test_text_stays_text_and_numbers_are_what_they_look_like():
    text = """
name: 0750
output: /o/{date}
prompts: ["clock at {time}, year {year}, {answer}", 12:30, off, null, ~]
variables: {time: [12:30, 0121], year: [0750], answer: [no, null, 1e3, 2026-11-23, 1.50]}
count: 007
seed: 0010
defaults:
  {num_frames: 0121, frame_rate: 024, seed: 0750, negative_prompt: no, pipeline: ~, images: [{path: 1:30, crf: 010}]}
render_options: [--compile, off, --tp, 04, --negative-prompt, null, --ray-address, 1:30]
"""
    recipe = schedule.parse_recipe(text)
    assert (recipe.name, recipe.count, recipe.seed) == ("0750", 7, 10)
    assert [t.text for t in recipe.templates[1:]] == ["12:30", "off", "null", "~"]
    assert recipe.variables == {
        "time": ("12:30", "0121"), "year": ("0750",), "answer": ("no", "null", "1e3", "2026-11-23", "1.50"),
    }  # fmt: skip
    assert recipe.defaults == {
        "num_frames": 121, "frame_rate": 24, "seed": 750, "negative_prompt": "no",
        "images": [{"path": "1:30", "crf": 10}],
    }  # fmt: skip
    assert " ".join(recipe.render_options) == "--compile off --tp 04 --negative-prompt null --ray-address 1:30"


@pytest.mark.parametrize("nothing", ["", "~", "null"])
def test_a_field_without_a_value_is_not_given(nothing):
    fields = ("variables", "manifest", "count", "seed", "defaults", "render_options")
    base = "name: n\noutput: /o\nprompts: [p]\n"
    assert rows(base + "".join(f"{name}: {nothing}\n" for name in fields)) == rows(base)
    assert rows(base + f"defaults: {{height: {nothing}, seed: {nothing}}}") == rows(base)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("count: 1:30", "count: '1:30', must be a whole number of at least 1 (line 5)"),
        ("seed: 0x10", "seed: '0x10', must be a whole number, 0 to 2^63-1 (line 5)"),
        ("seed: [1]", "seed: ['1'], must be a whole number, 0 to 2^63-1 (line 5)"),
        ("defaults: {frame_rate: 24:00}", "defaults.frame_rate: '24:00', must be frames a second, from 0.01 to"),
        ("defaults: {height: on}", "defaults.height: 'on', must be a positive multiple of 64 (line 5)"),
        ("defaults: {height: 2026-11-23}", "defaults.height: '2026-11-23', must be a positive multiple of 64 (line 5)"),
        ("defaults: {seed: 1.5}", "defaults.seed: '1.5', must be a whole number from 0 to 2^63-1 (line 5)"),
        ("defaults: {negative_prompt: [a]}", "defaults.negative_prompt: ['a'], must be text (empty for none) (line 5)"),
        ("defaults: {loras: [{name: a, weight: 1}]}", "must be a list of {name, strength}, names declared with"),
        ("defaults: [height]", "defaults: ['height'], must be a mapping of row fields (line 5)"),
        ("render_options: [--tp, [4]]", "render_options[1]: ['4'], must be text, in quotes where "),
        ("render_options: [--tp, ]\nmanifest: [x]", "manifest: ['x'], must be a path or URI (line 6)"),
        ("variables: {x: yes}", "variables.x: 'yes', must be a list of at least one string or number (line 5)"),
        ("variables: {12:30: [a]}", "variables: '12:30', must be a name like animal or time_of_day (line 5)"),
        ("variables: [x]", "variables: ['x'], must be a mapping of name to list (line 5)"),
        ("prompts: [q]", "not YAML: line 5: the key 'prompts' for the second time, after line 3"),
        ("---\nname: m", "not YAML: line 5: a second document begins; legal: one document"),
        ("on: 1", "unknown field: 'on', must be one of name, "),
    ],
)  # fmt: skip
def test_an_error_names_the_field_the_value_what_is_legal_and_the_line(line, message):
    with pytest.raises(ValueError) as error:
        schedule.parse_recipe(f"name: n\noutput: /o\nprompts: [p]\n\n{line}")
    assert message in str(error.value)


def test_an_unquoted_prompt_that_yaml_takes_for_a_mapping_is_refused():
    with pytest.raises(ValueError, match=r"prompts\[1\]: {'a fox': 'running'}, must be text, in quotes where .*line 5"):
        schedule.parse_recipe("name: n\noutput: /o\nprompts:\n- good\n- a fox: running")


def test_a_recipe_that_was_written_on_windows(tmp_path, capsys):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "r.yaml").write_bytes((RECIPE + "count: 3\nseed: 5").replace("\n", "\r\n").encode(encoding))
        assert schedule.main([str(tmp_path / "r.yaml"), "--date", DATE, "--dry-run"]) == 0
        assert "night-2026-11-23-51049d328049" in capsys.readouterr().out


def test_a_product_out_of_hand_needs_a_count():
    values = "[" + ", ".join(map(str, range(50))) + "]"
    text = "name: n\noutput: /o\nprompts: ['{a}{b}{c}']\nvariables:\n" + "".join(f"  {k}: {values}\n" for k in "abc")
    with pytest.raises(ValueError, match=r"count: None.*125000"):
        rows(text)
    assert len(rows(text + "count: 9")) == 9


def test_a_bad_line_of_a_manifest_is_named(tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"prompt": "p"}\nnot json\n')
    with pytest.raises(ValueError, match=r"pool.jsonl:2: "):
        rows("name: n\noutput: /o\nmanifest: pool.jsonl", folder=tmp_path)


@pytest.mark.parametrize("text", ["2026-13-01", "yesterday", "2026/11/23", ""])
def test_bad_dates(text):
    with pytest.raises(ValueError, match="--date"):
        schedule.parse_date(text)


@pytest.mark.parametrize(
    "field, words",
    [
        ("output: s3://KEY:verySecret1@b/{date}", "output: 's3://***@b/"),
        ("render_options: [--image-root, 's3://KEY:verySecret1@b/x']", "render_options: 's3://***@b/x'"),
        ("render_options: ['--image-root=s3://b/x?secret_key=verySecret1']", "render_options: '--image-root=s3://b/x?"),
    ],
)
def test_credentials_do_not_reach_the_command_of_a_job(tmp_path, capsys, field, words):
    (tmp_path / "night.yaml").write_text("name: night\noutput: /data\nprompts: [a]\n".replace(
        "output: /data\n" if field.startswith("output") else "\0", "") + field + "\n")  # fmt: skip
    assert schedule.main([str(tmp_path / "night.yaml"), "--date", DATE, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert words in err and "set them in the cluster's environment" in err and "verySecret1" not in out + err


def test_credentials_do_not_reach_the_job_by_its_entrypoint(tmp_path, capsys):
    (tmp_path / "night.yaml").write_text("name: night\noutput: /data\nprompts: [a]\n")
    entrypoint = "env FROM=s3://KEY:verySecret1@b/x python render.py"
    command = [str(tmp_path / "night.yaml"), "--date", DATE, "--dry-run", "--entrypoint", entrypoint]
    assert schedule.main(command) == 2
    out, err = capsys.readouterr()
    assert "--entrypoint: 'env FROM=s3://***@b/x python render.py', must be" in err and "verySecret1" not in out + err


@pytest.mark.parametrize(
    "output, out_dir, words",
    [
        ("C:\\ds", "m", "output: C:\\ds, is a Windows path"),
        ("$HOME/ds", "m", "output: $HOME/ds, begins with a variable"),
        ("/ds", "", "--out-dir: '', names no place"),
        ("/ds", "s3://KEY:verySecret1@b/m", "--out-dir: 's3://***@b/m', must be without credentials"),
    ],
)
def test_a_place_that_is_refused_has_the_name_of_its_field(tmp_path, capsys, output, out_dir, words):
    (tmp_path / "night.yaml").write_text(f"name: night\noutput: {output}\nprompts: [a]\n")
    assert schedule.main([str(tmp_path / "night.yaml"), "--date", DATE, "--dry-run", "--out-dir", out_dir]) == 2
    assert f"schedule.py: {words}" in capsys.readouterr().err


def test_paths_of_a_schedule_mean_what_they_mean_elsewhere(tmp_path, capsys, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "images": [{"path": "pics/a.png"}]}\n')
    recipe = "name: night\noutput: {}\nmanifest: {}\n"
    seen = set()
    for output, manifest in (
        ("~/ds/", "pool.jsonl"),
        ("../ds", "~/pool.jsonl"),
        (f"file://{tmp_path}/ds", "./pool.jsonl"),
    ):
        # As an editor on Windows writes it.
        (tmp_path / "r.yaml").write_bytes(recipe.format(output, manifest).replace("\n", "\r\n").encode("utf-16"))
        assert schedule.main(["~/r.yaml", "--date", DATE, "--dry-run", "--out-dir", "~/m"]) == 0
        runs = capsys.readouterr().out.split("runs ")[1]
        seen.add(runs.partition("render.py")[2].strip())
    assert seen == {f"{tmp_path}/m/night-{DATE}.jsonl --output {tmp_path}/ds --image-root {tmp_path}"}


def test_an_output_in_a_jobs_copy_of_its_folder_is_refused_before_anything_is_submitted(tmp_path, capsys, monkeypatch):
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    (copy / "r.yaml").write_text("name: night\noutput: out/{date}\nprompts: [a]\n")
    assert schedule.main(["r.yaml", "--date", DATE, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert f"output: '{copy}/out/{DATE}', must be a place outside of the copy that Ray makes" in err and not out


def test_dry_run_writes_and_submits_nothing(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    argv = [str(recipe), "--date", DATE, "--out-dir", str(tmp_path / "out"), "--dry-run"]
    assert schedule.main(argv) == 0
    assert "night-2026-11-23.jsonl (10 rows)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_usage_errors_are_exit_2(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    assert schedule.main([str(tmp_path / "none.yaml")]) == 2
    assert schedule.main([str(recipe)]) == 2
    assert "--address" in capsys.readouterr().err
    assert schedule.main([str(recipe), "--address", "127.0.0.1:1"]) == 2
    recipe.write_text(RECIPE + "colour: red")
    assert schedule.main([str(recipe)]) == 2
    assert "r.yaml: unknown field: 'colour'" in capsys.readouterr().err


class FakeJobs:
    """The part of the job API that submit_once uses; `before_submit` lets another caller act first."""

    def __init__(self, statuses=None, before_submit=None):
        self.statuses, self.before_submit, self.submitted = dict(statuses or {}), before_submit, []

    def get_job_status(self, job):
        if job not in self.statuses:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return SimpleNamespace(value=self.statuses[job])

    def submit_job(self, *, submission_id, entrypoint, metadata):
        if self.before_submit:
            self.before_submit(self)
        if submission_id in self.statuses:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.statuses[submission_id] = "PENDING"
        self.submitted.append(submission_id)


@pytest.mark.parametrize(
    ("statuses", "name", "words", "submitted"),
    [
        ({}, "id", "submitted", ["id"]),
        ({"id": "PENDING"}, "id", "already there (pending)", []),
        ({"id": "RUNNING"}, "id", "already there (running)", []),
        ({"id": "SUCCEEDED"}, "id", "already there (succeeded)", []),
        ({"id": "FAILED"}, "id-2", "submitted again (previous job: failed)", ["id-2"]),
        ({"id": "FAILED", "id-2": "RUNNING"}, "id-2", "already there (running)", []),
        ({"id": "FAILED", "id-2": "STOPPED"}, "id-3", "submitted again (previous job: stopped)", ["id-3"]),
    ],
)
def test_submit_once(statuses, name, words, submitted):
    jobs = FakeJobs(statuses)
    assert schedule.submit_once(jobs, "id", "true", {}) == (name, words)
    assert jobs.submitted == submitted


@pytest.mark.parametrize("statuses", [{}, {"id": "FAILED"}])
def test_losing_a_race_is_success(statuses):
    name = "id-2" if statuses else "id"
    jobs = FakeJobs(statuses, before_submit=lambda self: self.statuses.update({name: "RUNNING"}))
    found, words = schedule.submit_once(jobs, "id", "true", {})
    assert found == name and "by another caller" in words and not jobs.submitted


def test_the_example_recipe_is_good_and_needs_no_torch():
    code = (
        "import sys; sys.path.insert(0, 'jobs'); import schedule; "
        "assert schedule.main(['jobs/nightly.yaml', '--date', '2026-11-23', '--dry-run']) == 0; "
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_row_fields_are_those_of_a_request():
    from ltx_ray.records import RenderRequest

    names = {f.name for f in dataclasses.fields(RenderRequest)}
    assert names - {"prompt", "id", "extra"} == schedule_recipe.ROW_FIELDS


def test_help_is_whole(capsys):
    with pytest.raises(SystemExit):
        schedule.main(["--help"])
    assert "--entrypoint" in capsys.readouterr().out
    assert all(f"    {name}: " in schedule.__doc__ for name in schedule_recipe.RECIPE_FIELDS)


def test_attempts_that_failed_are_counted_and_those_that_were_stopped_are_not():
    statuses = {"id": "FAILED", "id-2": "STOPPED", "id-3": "FAILED"}
    assert schedule.submit_once(FakeJobs(statuses), "id", "true", {}, attempts=3)[0] == "id-4"
    jobs = FakeJobs(statuses)
    with pytest.raises(ValueError, match=r"--attempts: 2, and 2 jobs of this .*, id-3 the last of them; legal: a larg"):
        schedule.submit_once(jobs, "id", "true", {}, attempts=2)
    assert not jobs.submitted


# ---- the command line with a cluster that answers --------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """The jobs of a cluster that `main` submits to, and the exit codes of those that are followed, by their date."""
    jobs, codes, outputs = FakeJobs(), {}, []

    def follow(client, job, drain, say, output):
        outputs.append(output)
        return codes.get(job[6:16], 0)

    monkeypatch.setattr(schedule, "connect", lambda address: jobs)
    monkeypatch.setattr(schedule, "follow", follow)
    return SimpleNamespace(jobs=jobs, codes=codes, outputs=outputs)


def submit(recipe, *options):
    return schedule.main([str(recipe), "--address", "http://h:1", *options])


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_the_manifest_of_a_date_is_written_once_below_the_output(tmp_path, kind, request, cluster, capsys):
    place = request.getfixturevalue("bucket") if kind == "bucket" else str(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("/data/", f"{place}/"))
    assert submit(recipe, "--date", DATE) == 0
    out, err = capsys.readouterr()
    path = f"{place}/night/{DATE}/state/manifests/night-{DATE}.jsonl"
    assert f"manifest  {path} (10 rows)" in out and f" {path} --output {place}/night/{DATE}\n" in out and not err
    store = schedule.Store(f"{place}/night/{DATE}/state/manifests")
    written = store.read_bytes(f"night-{DATE}.jsonl")
    assert written.count(b"\n") == 10

    recipe.write_text(recipe.read_text() + "count: 3\n")
    for more in ([], ["--dry-run"]):
        assert submit(recipe, "--date", DATE, *more) == 0
        out, err = capsys.readouterr()
        assert "(10 rows)" in out and f"{path}: stands as drawn, though the recipe or its pool has changed since" in err
    assert store.read_bytes(f"night-{DATE}.jsonl") == written and len(cluster.jobs.submitted) == 1

    assert submit(recipe, "--date", "2026-11-24") == 0
    out, err = capsys.readouterr()
    assert "(3 rows)" in out and not err


def test_of_two_callers_with_two_recipes_the_second_takes_what_the_first_wrote(tmp_path, monkeypatch, cluster, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("/data/", f"{tmp_path}/"))
    create = schedule.Store.create

    def after_another(store, name, data):
        assert create(store, name, b'{"id": "x", "prompt": "p"}\n')
        return create(store, name, data)

    monkeypatch.setattr(schedule.Store, "create", after_another)
    assert submit(recipe, "--date", DATE) == 0
    out, err = capsys.readouterr()
    assert "(1 rows)" in out and "stands as drawn" in err


def test_images_of_a_manifest_that_stands_stay_findable(tmp_path, cluster, capsys):
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"prompt": "p", "images": [{"path": "a.png"}]}\n')
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: night\noutput: {tmp_path}/out\nmanifest: pool.jsonl\n")
    for _ in range(2):
        assert submit(recipe, "--date", DATE) == 0
        assert capsys.readouterr().out.split("runs ")[1].splitlines()[0].endswith(f" --image-root {tmp_path}")
        pool.write_text('{"prompt": "p"}\n')
    assert len(cluster.jobs.submitted) == 1


def test_a_manifest_that_cannot_be_written_is_exit_1(tmp_path, cluster, capsys):
    (tmp_path / "file").write_text("")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: night\noutput: {tmp_path}/file\nprompts: [p]\n")
    assert submit(recipe, "--date", DATE) == 1
    err = capsys.readouterr().err
    assert err.startswith("schedule.py: ") and f"{tmp_path}/file" in err and not cluster.jobs.submitted


@pytest.mark.parametrize(
    ("codes", "code", "rendered"),
    [({}, 0, 3), ({"2026-11-30": 3}, 3, 3), ({"2026-11-30": 4}, 4, 1), ({"2026-12-01": 143}, 143, 2)],
)
def test_a_backfill_renders_one_date_after_the_other_and_goes_on_after_failed_rows(
    tmp_path, cluster, codes, code, rendered
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("/data/", f"{tmp_path}/"))
    cluster.codes.update(codes)
    assert submit(recipe, "--backfill", "2026-11-30..2026-12-02", "--wait") == code
    dates = ["2026-11-30", "2026-12-01", "2026-12-02"][:rendered]
    assert [name[6:16] for name in cluster.jobs.submitted] == dates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backfill", "2026-11-02..2026-11-01", "--wait"], "--backfill: '2026-11-02..2026-11-01', must be FROM..TO,"),
        (["--backfill", "2026-11-02", "--wait"], "--backfill: '2026-11-02', must be FROM..TO, dates as YYYY-MM-DD in"),
        (["--backfill", "a..b..c", "--wait"], "--backfill: 'a..b..c', must be FROM..TO"),
        (
            ["--backfill", "2026-11-01..2026-11-02"],
            "--backfill: '2026-11-01..2026-11-02', must be with --wait, or with",
        ),
        (
            ["--backfill", "2026-11-01..2026-11-02", "--wait", "--date", DATE],
            "--date and --backfill exclude each other",
        ),
        (["--attempts", "0"], "--attempts: 0, must be a whole number of at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_exit_2(tmp_path, cluster, capsys, options, message):
    assert submit(tmp_path / "none.yaml", *options) == 2
    assert f"schedule.py: {message}" in capsys.readouterr().err and not cluster.jobs.submitted


def test_a_single_day_and_a_dry_run_are_a_backfill(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    for dates, count in (("2026-11-01..2026-11-01", 1), ("2026-02-27..2026-03-01", 3)):
        assert schedule.main([str(tmp_path / "r.yaml"), "--backfill", dates, "--dry-run"]) == 0
        assert capsys.readouterr().out.count("manifest  ") == count


def test_a_pool_that_holds_the_output_does_not_grow_by_what_was_drawn(tmp_path, cluster, capsys):
    (tmp_path / "pool.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text('{"run_id": "x"}')
    (tmp_path / "r.yaml").write_text(f"name: night\noutput: {tmp_path}/out\nmanifest: {tmp_path}\n")
    for date in (DATE, "2026-11-24"):
        assert submit(tmp_path / "r.yaml", "--date", date) == 0
        assert "(1 rows)" in capsys.readouterr().out
