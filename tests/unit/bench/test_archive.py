"""A suite's runs in one file: the same tables as from the runs' folders, and nothing is run twice."""

import shutil

import pytest

from sbft.bench.archive import ARCHIVE_FILE, archive_runs, archived_runs
from sbft.bench.report import write_report
from sbft.bench.runner import prepare
from sbft.bench.schedule import plan
from sbft.bench.suite_runs import RUNS_FOLDER, possible_runs, read_process, read_run, run_folder
from sbft.errors import DataError
from tests.unit.bench.report_cases import crowd, leave, record, store, suite


def archive(folder):
    """Put the runs of a suite into one file and delete their folders."""
    count = archive_runs(folder / RUNS_FOLDER, folder / ARCHIVE_FILE)
    shutil.rmtree(folder / RUNS_FOLDER)
    return count


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in {".md", ".csv"}}


def test_the_report_of_an_archive_is_that_of_the_folders(tmp_path):
    made = crowd(tmp_path, tasks=1)
    write_report(tmp_path)
    before, planned = texts(tmp_path), plan(made, tmp_path)
    count = archive(tmp_path)
    assert count == sum(one.record is not None for one in planned) > 50
    for path in list(tmp_path.glob("*.csv")) + list(tmp_path.glob("*.md")):
        path.unlink()
    write_report(tmp_path)
    assert texts(tmp_path) == before
    assert plan(made, tmp_path) == planned


def test_the_lines_are_sorted_and_say_the_same_when_written_again(tmp_path):
    made = store(one := suite(), tmp_path)
    for run in reversed(possible_runs(one)[:4]):
        leave(made, run, record(one, run), at_once=2)
    archive_runs(made / RUNS_FOLDER, made / "first.jsonl")
    archive_runs(made / RUNS_FOLDER, made / "second.jsonl")
    assert (made / "first.jsonl").read_bytes() == (made / "second.jsonl").read_bytes()
    archive(made)
    assert list(archived_runs(made)) == sorted(run.name for run in possible_runs(one)[:4])
    assert read_process(made, possible_runs(one)[0])["at_once"] == 2


def test_unfinished_runs_stay_behind(tmp_path):
    one = suite()
    store(one, tmp_path)
    finished, unfinished = possible_runs(one)[:2]
    leave(tmp_path, finished, record(one, finished))
    leave(tmp_path, unfinished, record(one, unfinished, status="unfinished"))
    assert archive(tmp_path) == 1
    assert read_run(tmp_path, finished) is not None and read_run(tmp_path, unfinished) is None


def test_a_failed_run_of_an_archive_is_made_again_when_asked(tmp_path):
    one = suite()
    store(one, tmp_path)
    failed, good = possible_runs(one)[:2]
    leave(tmp_path, failed, record(one, failed, status="error", error="gone"))
    leave(tmp_path, good, record(one, good))
    archive(tmp_path)
    prepare(one, tmp_path)
    assert read_run(tmp_path, failed).error == "gone"
    prepare(one, tmp_path, retry=True)
    assert read_run(tmp_path, failed) is None and read_run(tmp_path, good).status == "ok"


def test_a_folder_comes_before_the_archive(tmp_path):
    one = suite()
    store(one, tmp_path)
    run = possible_runs(one)[0]
    leave(tmp_path, run, record(one, run, exact_match=0.5))
    archive(tmp_path)
    leave(tmp_path, run, record(one, run, exact_match=0.75))
    assert run_folder(tmp_path, run).is_dir()
    assert read_run(tmp_path, run).metrics["exact_match"] == 0.75


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / ARCHIVE_FILE).write_text('{"run": "a"}\n')
    with pytest.raises(DataError, match=r"Line 1 of .*runs\.jsonl does not describe a run"):
        archived_runs(tmp_path)
    (tmp_path / RUNS_FOLDER).mkdir()
    with pytest.raises(DataError, match="There is no finished run below"):
        archive_runs(tmp_path / RUNS_FOLDER, tmp_path / "empty.jsonl")
