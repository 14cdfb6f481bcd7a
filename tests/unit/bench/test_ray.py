"""`sbft bench --ray` without Ray: what runs require, what is sent, what a machine does with a run, and lost runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sbft.bench.live import SuiteProgress
from sbft.bench.machine import ThisMachine
from sbft.bench.outcome import conclude
from sbft.bench.process import ActiveProcess, log_beside, recipe_beside, try_lock
from sbft.bench.ray import transfer, worker
from sbft.bench.ray.cluster import Lost, RemoteRun
from sbft.bench.ray.connection import connect
from sbft.bench.ray.needs import Needs, local_files, needs, passed_on, room
from sbft.bench.ray.transfer import files_below, pack, unpack, unpack_run
from sbft.bench.ray.worker import Delivery, Inputs, Order, make, seen
from sbft.bench.runner import prepare, run_suite
from sbft.bench.schedule import plan
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, possible_runs, read_run, run_folder
from sbft.cli.app import app
from sbft.errors import ClusterError, Interrupted, RecipeError
from sbft.recipe.methods import METHODS
from sbft.runs.record import SCHEMA, RunRecord

SUITE: dict[str, Any] = {
    "models": ["model"],
    "tasks": {"sums": {"data": {"train": "data/train.jsonl", "validation_size": 2, "eval": "/every/machine.jsonl"}}},
    "methods": {"sbft": {"learning_rates": [1e-3]}},
    "baseline": "sbft",
}


class Store:
    """An object store that numbers its pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def put(self, piece: bytes) -> int:
        self.pieces.append(piece)
        return len(self.pieces) - 1

    def get(self, number: int) -> bytes:
        return self.pieces[number]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this machine works on the cluster's runs."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"sbft-bench-{os.getuid()}"


@pytest.mark.parametrize(
    ("nodes", "jobs", "expected", "at_once"),
    [
        # Without GPUs: as much as the smallest machine for each run; a head without CPUs for runs does not count.
        ([{"CPU": 8.0}, {"CPU": 8.0}, {"memory": 1.0}], None, Needs(8, 0), 2),
        ([{"CPU": 4.0}, {"CPU": 9.0}], None, Needs(4, 0), 3),
        # With more runs at once than machines, runs share the CPUs of a machine; never less than one CPU.
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, Needs(4, 0), 4),
        ([{"CPU": 2.0}], 16, Needs(1, 0), 2),
        # With GPUs: one for each run, and its share of the CPUs.
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0}], None, Needs(4, 1), 4),
        ([{"CPU": 1.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}], None, Needs(1, 1), 3),
    ],
)
def test_what_a_run_asks_for_and_how_many_fit(
    nodes: list[dict[str, float]], jobs: int | None, expected: Needs, at_once: int
) -> None:
    assert needs(nodes, jobs, use_gpus=True) == expected
    assert room(nodes, expected) == at_once


def test_gpus_are_left_alone_when_hidden_and_a_cluster_without_cpus_is_refused() -> None:
    assert needs([{"CPU": 16.0, "GPU": 4.0}], None, use_gpus=False) == Needs(16, 0)
    with pytest.raises(ClusterError, match="No machine of the Ray cluster has a CPU"):
        needs([{"memory": 1.0}], None, use_gpus=True)


def test_runs_get_settings_and_tokens_of_the_runner_but_not_its_paths() -> None:
    here = {
        "HF_TOKEN": "hf_x",
        "HF_HOME": "/home/me/hf",
        "SBFT_CACHE": "~/c",
        "TORCHDYNAMO_DISABLE": "1",
        "PATH": "/bin",
    }
    assert passed_on(here) == {"HF_TOKEN": "hf_x", "TORCHDYNAMO_DISABLE": "1"}
    assert passed_on({"CUDA_VISIBLE_DEVICES": "0,1"}) == {}
    assert passed_on({"CUDA_VISIBLE_DEVICES": ""}) == {"CUDA_VISIBLE_DEVICES": ""}


def test_tokens_are_not_shown_with_an_order(work: Path) -> None:
    order = order_for(Suite.model_validate(SUITE), environment={"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in repr(order)


def test_files_travel_whole_and_large_ones_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "INLINE_BYTES", 4)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 3)
    content = {"small": b"abcd", "large": bytes(range(10)), "below/empty": b""}
    for name, value in content.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(value)
    store = Store()
    packed = pack(tmp_path / "from", files_below(tmp_path / "from"), store.put)
    assert store.pieces == [b"\0\1\2", b"\3\4\5", b"\6\7\10", b"\11"]
    unpack(packed, tmp_path / "to", store.get)
    assert {name: (tmp_path / "to" / name).read_bytes() for name in files_below(tmp_path / "to")} == content


def test_the_record_arrives_last(tmp_path: Path) -> None:
    """If the transfer is cut off anywhere before, the run counts as not done."""
    source = tmp_path / "from"
    source.mkdir()
    for name in ("a", "log.txt", "run.json", "z"):
        (source / name).write_bytes(name.encode())
    store = Store()
    packed = pack(source, files_below(source), store.put)
    lost = [transfer.Parcel("z", (7,)) if one.name == "z" else one for one in packed]  # a piece that does not exist
    run = tmp_path / "runs" / "seed=0"
    with pytest.raises(IndexError):
        unpack_run(lost, run, store.get)
    assert not (run / "run.json").exists()
    unpack_run(packed, run, store.get)
    assert files_below(run) == ["a", "run.json", "z"]
    assert log_beside(run).read_text() == "log.txt"


def test_relative_paths_name_the_files_that_travel(tmp_path: Path) -> None:
    suite = Suite.model_validate(SUITE)
    assert local_files(suite, tmp_path) == []  # a hub id, perhaps
    for name in ("data/train.jsonl", "model/config.json", "model/part/weights", "data/other.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert local_files(suite, tmp_path) == ["data/train.jsonl", "model/config.json", "model/part/weights"]
    (tmp_path / "here").mkdir()
    outside = Suite.model_validate({**SUITE, "models": ["../model"]})
    with pytest.raises(RecipeError, match=r"models \(\.\./model\) is \.\./model, outside the folder"):
        local_files(outside, tmp_path / "here")


def order_for(suite: Suite, **changes: Any) -> Order:
    return Order(suite, possible_runs(suite)[0], **{
        "suite_id": "abc", "output_dir": "runs/mine", "cpus": 3, "inputs": Inputs(Path.cwd()), **changes
    })  # fmt: skip


def process_that(code: str) -> Callable[..., ActiveProcess]:
    """Stands in for `start`: starts a process that runs this code, with the run's folder as `target`."""

    def start(
        suite: Suite, folder: Path, run: Run, *, lock: int, slot: int, environment: dict[str, str],
        working_folder: Path | None,
    ) -> ActiveProcess:  # fmt: skip
        target = run_folder(folder, run)
        target.mkdir(parents=True, exist_ok=True)
        recipe_beside(target).write_text("")
        command = [sys.executable, "-c", f"from pathlib import Path; import os; target = Path({str(target)!r})\n{code}"]
        with log_beside(target).open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment}, cwd=working_folder, pass_fds=(lock,),
                start_new_session=True,
            )  # fmt: skip
        return ActiveProcess(run, target, lock, slot, suite.time_limit_s, process)

    return start


def finished(suite: Suite, output_dir: str = "/somewhere/else") -> str:
    """Code of a process that writes a record and the other files of a run."""
    run = possible_runs(suite)[0]
    recipe = {**run.whole_recipe(suite).model_dump(mode="json", exclude_none=True), "output_dir": output_dir}
    record = RunRecord(
        method="sbft", model="model", dataset="d", seed=0, status="ok", metrics={"loss": 1.5}, recipe=recipe
    )
    written = json.dumps({"schema": SCHEMA, **asdict(record)})
    return f"""
(target / "run.json").write_text({written!r})
(target / "recipe.yaml").write_text("model: model\\noutput_dir: /somewhere/else\\n")
(target / "predictions.jsonl").write_text(os.environ["OMP_NUM_THREADS"] + os.environ.get("HF_HUB_OFFLINE", ""))
(target / "model.safetensors").write_bytes(b"weights")
print(Path("data/train.jsonl").exists())
"""


class FakeCluster:
    """Carries out orders at once, in this process; receiving raises the given `losses` first."""

    def __init__(self, losses: list[Lost] | None = None, keeps: int = 0) -> None:
        self.losses, self.store, self.orders, self.cancelled = losses or [], Store(), [], 0  # type: ignore[var-annotated]
        self.needs, self.room, self.jobs = Needs(1, 0), 1, 2
        self.keeps = keeps
        """How many deliveries arrive; the runner waits for later ones until somebody presses Ctrl-C."""

    def missing_package(self, suite: Suite, variant: str) -> None:
        return None

    def start(self, suite: Suite, folder: Path, run: Run, *, lock: int, slot: int, say: Any) -> RemoteRun:
        target = run_folder(folder, run)
        order = Order(suite, run, "abc", str(target), 1, Inputs(Path.cwd()))
        return RemoteRun(run, target, lock, slot, None, self, order, folder, say)  # type: ignore[arg-type]

    def submit(self, order: Order) -> Order:
        self.orders.append(order)
        return order

    def has_ended(self, order: Order) -> bool:
        if self.keeps == 0:
            return True
        if len(self.orders) > self.keeps:
            raise KeyboardInterrupt
        return True

    def receive(self, order: Order, folder: Path) -> Delivery:
        if self.losses:
            raise self.losses.pop(0)
        delivery = make(order, self.store.put, self.store.get)
        unpack_run(delivery.files, folder, self.store.get)
        return delivery

    def cancel(self, order: Order, *, force: bool = False) -> None:
        self.cancelled += 1

    def wait(self, order: Order) -> bool:
        return True


def give(cluster: FakeCluster | ThisMachine, suite: Suite, folder: Path) -> str:
    """Run a suite on a cluster; returns what was printed."""
    out = io.StringIO()
    prepare(suite, folder)
    with SuiteProgress(Console(file=out, width=300), suite, folder, 1) as progress:
        run_suite(suite, folder, progress, place=cluster)  # type: ignore[arg-type]
    return out.getvalue()


def test_a_machine_makes_a_run_and_keeps_nothing_of_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = Suite.model_validate(SUITE)
    monkeypatch.setattr(worker, "start", process_that(finished(suite)))
    store = Store()
    order = order_for(suite, environment={"HF_HUB_OFFLINE": "here"})
    delivery = make(order, store.put, store.get)
    assert (delivery.exit_code, delivery.timed_out, delivery.at_once) == (0, False, 1)
    assert delivery.cores == os.cpu_count() and delivery.elapsed_s > 0
    assert files_below(work / "abc" / "runs") == [] and work.stat().st_mode & 0o077 == 0
    unpack_run(delivery.files, tmp_path / "mine", store.get)
    assert files_below(tmp_path / "mine") == ["predictions.jsonl", "recipe.yaml", "run.json"]
    record = RunRecord.load(tmp_path / "mine")
    # Weights that the suite does not keep are not sent, but their size is recorded.
    assert record.saved_bytes == len(b"weights") and record.recipe["output_dir"] == "runs/mine"
    assert (tmp_path / "mine" / "recipe.yaml").read_text() == "model: model\noutput_dir: runs/mine\n"
    assert (tmp_path / "mine" / "predictions.jsonl").read_text() == "3here"


def test_weights_are_sent_where_the_suite_keeps_them(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite.model_validate({**SUITE, "keep_models": True})
    monkeypatch.setattr(worker, "start", process_that(finished(suite)))
    store = Store()
    delivery = make(order_for(suite), store.put, store.get)
    assert "model.safetensors" in {parcel.name for parcel in delivery.files}


@pytest.mark.parametrize("shared", [True, False])
def test_relative_paths_hold_on_a_machine_that_has_the_files_and_on_one_that_has_not(
    shared: bool, work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = Suite.model_validate(SUITE)
    monkeypatch.setattr(worker, "start", process_that("print(os.getcwd(), Path('data/train.jsonl').read_text())"))
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    (here / "data" / "train.jsonl").write_text("rows")
    names = ["data/train.jsonl"]
    store = Store()
    inputs = Inputs(
        here, tuple((name, *(seen(here / name) or (0, 0))) for name in names), tuple(pack(here, names, store.put))
    )
    if not shared:
        here.rename(tmp_path / "away")
    order = order_for(suite, inputs=inputs)
    said = set()
    for _ in range(2):  # the second order finds what the first has unpacked
        (log,) = make(order, store.put, store.get).files
        (text,) = log.pieces
        said.add(text.decode())
    (line,) = said
    folder, _, rows = line.strip().partition(" ")
    assert rows == "rows" and (folder == str(here)) == shared and (shared or Path(folder).is_relative_to(work))


def test_a_cancelled_run_leaves_no_process_and_lets_go_of_its_lock(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite.model_validate(SUITE)
    started = []
    begin = process_that("import time; time.sleep(600)")

    def start(*arguments: Any, **options: Any) -> ActiveProcess:
        started.append(begin(*arguments, **options))
        return started[0]

    def cancelled(seconds: float) -> None:
        raise KeyboardInterrupt  # as Ray does

    monkeypatch.setattr(worker, "start", start)
    monkeypatch.setattr("sbft.bench.ray.worker.time.sleep", cancelled)
    with pytest.raises(KeyboardInterrupt):
        make(order_for(suite), Store().put, Store().get)
    assert started[0].process.returncode == -9
    lock = try_lock(work / "abc", possible_runs(suite)[0])
    assert lock is not None
    os.close(lock)


def test_a_folder_of_somebody_else_is_not_used(work: Path, tmp_path: Path) -> None:
    work.symlink_to(tmp_path)
    with pytest.raises(ClusterError, match="belongs to another user"):
        worker.work_folder()


def test_what_was_lost_is_begun_again_and_finished_once(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = Suite.model_validate({**SUITE, "seeds": [0, 1]})
    monkeypatch.setattr(worker, "start", process_that(finished(suite)))
    folder = tmp_path / "suite"
    cluster = FakeCluster([Lost("its machine died"), Lost("its worker process died")])
    said = give(cluster, suite, folder)
    assert "its machine died; it starts again (retry 1 of 3)" in said
    assert [one.state for one in plan(suite, folder)] == ["done", "done"] and len(cluster.orders) == 4
    for one in plan(suite, folder):
        assert said.count(f"{one.name}: done in") == 1
        assert files_below(folder / "runs" / one.name) == [
            "log.txt", "predictions.jsonl", "process.json", "recipe.yaml", "run.json",
        ]  # fmt: skip
    # Nothing is left to do, here or on the cluster.
    assert give(cluster, suite, folder) == "" and len(cluster.orders) == 4


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_what_is_lost_again_and_again_is_a_result_that_says_why(out_of_memory: bool, tmp_path: Path) -> None:
    suite = Suite.model_validate(SUITE)
    (run,) = possible_runs(suite)
    losses = [Lost("its machine died"), *(Lost("its end", out_of_memory=out_of_memory) for _ in range(3))]
    cluster = FakeCluster(losses)
    give(cluster, suite, tmp_path)
    record = read_run(tmp_path, run)
    assert record is not None and record.status == ("oom" if out_of_memory else "error")
    assert record.error == "The Ray cluster lost this run 4 times before it had ended: its machine died; its end."
    assert len(cluster.orders) == 4 and record.recipe["training"]["learning_rate"] == 1e-3


def test_ctrl_c_cancels_what_runs_and_the_rest_is_made_without_ray(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = Suite.model_validate({**SUITE, "seeds": [0, 1, 2]})
    monkeypatch.setattr(worker, "start", process_that(finished(suite)))
    cluster = FakeCluster(keeps=2)
    with pytest.raises(Interrupted, match="Stopped by Ctrl-C with 2 runs finished"):
        give(cluster, suite, tmp_path / "suite")
    assert [order.run.seed for order in cluster.orders] == [0, 1, 2] and cluster.cancelled == 1
    assert [one.state for one in plan(suite, tmp_path / "suite")] == ["done", "done", "to do"]
    monkeypatch.setattr("sbft.bench.process.start", partial(process_that(finished(suite)), working_folder=None))
    said = give(ThisMachine(), suite, tmp_path / "suite")
    assert said.count(": done in") == 1 and "test-seed=2: done in" in said
    assert [one.state for one in plan(suite, tmp_path / "suite")] == ["done"] * 3


def test_the_machine_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(METHODS, "sbft", replace(METHODS["sbft"], packages={"no_such_package": "lora"}))
    suite = Suite.model_validate(SUITE)
    give(FakeCluster(), suite, tmp_path)
    record = read_run(tmp_path, possible_runs(suite)[0])
    assert record is not None and record.status == "unsupported" and "no_such_package" in str(record.error)


@pytest.mark.parametrize("code", ["os.kill(os.getpid(), 9)", "print('Error: There is no model.'); raise SystemExit(2)"])
def test_a_process_that_left_no_record_is_judged_as_on_this_machine(
    code: str, work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = Suite.model_validate(SUITE)
    (run,) = possible_runs(suite)
    monkeypatch.setattr(worker, "start", process_that(code))
    give(FakeCluster(), suite, tmp_path / "ray")
    here = run_folder(tmp_path / "here", run)
    lock = try_lock(tmp_path / "here", run)
    assert lock is not None
    active = process_that(code)(
        suite, tmp_path / "here", run, lock=lock, slot=0, environment={}, working_folder=None
    )  # fmt: skip
    active.wait()
    conclude(suite, active)
    active.release()
    records = [read_run(tmp_path / name, run) for name in ("ray", "here")]
    assert records[0] is not None and records[0] == records[1] and records[0].status != "ok"
    assert (here / "log.txt").read_bytes() == (run_folder(tmp_path / "ray", run) / "log.txt").read_bytes()


def test_without_ray_the_command_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["bench", "quick", "--ray", "local", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2 and "Type: pip install 'ray" in result.stderr


def test_where_nobody_answers_there_is_a_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ClusterError, match=f"No Ray cluster answers at --ray {address}: .*refused"):
            connect(address)
