"""What commands say of an output that cannot be written: its path, why, and what is legal; no number of an error."""

from __future__ import annotations

import errno
import re
from dataclasses import replace

import pytest

from ltx_ray.cli.app import main
from ltx_ray.storage import local_files, store
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import build
from tests.support.datasets import dataset_writer
from tests.support.results import RENDERED
from tests.support.samples import request


@pytest.fixture
def out(tmp_path) -> str:
    """A dataset with rows in parts, and one in a segment."""
    output = str(tmp_path / "out")
    writer = dataset_writer(build(Store(output)))
    writer.write_index(
        "e" * 32, request(id="e", prompt="a cat"), replace(RENDERED, clip=replace(RENDERED.clip, path=None))
    )
    writer.log.commit()
    return output


@pytest.fixture
def refuse(monkeypatch):
    """Has writes below a folder refused."""
    write = local_files.write_synced

    def call(folder: str, number: int, words: str) -> None:
        def refused(path, data, target):
            if str(target).startswith(folder):
                raise OSError(number, words, str(path))
            return write(path, data, target)

        for module in (local_files, store):
            monkeypatch.setattr(module, "write_synced", refused)

    return call


@pytest.fixture
def error_of(tmp_path, capfd):
    def call(command: str, out: str) -> tuple[int, str]:
        (tmp_path / "ids").write_text("a\n")
        words = command.format(out=out, ids=tmp_path / "ids", other=tmp_path / "other").split()
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capfd.readouterr().err
        assert "Traceback" not in said and "Errno" not in said and not re.search(r"\.[0-9a-f]{8}\b", said), said
        return caught.value.code, said

    return call


@pytest.mark.parametrize(
    "command",
    [
        "report {out}", "report {out} --against {out}", "report {out} --serve 0", "fold {out}", "fold {out} --migrate",
        "remove {out} --ids {ids}", "verify {out} --repair", "promote {out} --where motion>0 --model toy",
    ],
)  # fmt: skip
def test_a_read_only_output(out, refuse, error_of, command):
    refuse(out, errno.EROFS, "Read-only file system")
    code, said = error_of(command, out)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: OUTPUT: {out}, cannot be written (Read-only file system); legal: a place in which")


@pytest.mark.parametrize("form", ["webdataset", "hf", "delta"])
def test_a_read_only_destination(out, refuse, error_of, tmp_path, form):
    refuse(str(tmp_path / "other"), errno.EACCES, "Permission denied")
    code, said = error_of(f"export {{out}} {{other}} --to {form}", out)
    assert code == 2 and f"DESTINATION: {tmp_path}/other, cannot be written (Permission denied); legal: " in said


@pytest.mark.parametrize("command", ["fold {out}", "remove {out} --ids {ids}"])
def test_a_folder_of_the_output_that_cannot_be_written(out, refuse, error_of, command):
    refuse(f"{out}/index", errno.EACCES, "Permission denied")
    code, said = error_of(command, out)
    assert code == 1 and re.fullmatch(rf"error: {out}/index/part-\w+-\w+\.parquet: Permission denied\n", said)


def test_a_file_to_resume_from_that_cannot_be_written(out, error_of):
    code, said = error_of("verify {out} --resume /proc/nothing/here", out)
    assert code == 2 and "--resume: /proc/nothing/here, cannot be read or written (No such file or directory)" in said
