"""How long OpenMP's threads spin: it depends on how long they wait for a core, and never overrides the user's settings."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import textwrap
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sbft.evaluation.likelihood import evaluating
from sbft.native import openmp
from sbft.native.openmp import Look, ShortSpin, SpinWatch, is_crowded, look, openmp_runtime, spinning_while_alone
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

NS = 1_000_000_000
on_libgomp = pytest.mark.skipif(
    look() is None or "libgomp" not in str(openmp_runtime()), reason="torch has another OpenMP runtime here"
)


class FakeLibgomp:
    """Records the size of each team it is asked for, and by which thread."""

    def __init__(self) -> None:
        self.teams: list[int] = []
        self.masters: list[threading.Thread] = []

    def GOMP_parallel(self, function: Any, data: None, team: Any, flags: Any) -> None:
        assert function.value and data is None and flags.value == 0
        self.teams.append(team.value)
        self.masters.append(threading.current_thread())


def watching() -> bool:
    return any(thread.name == "sbft-spin-watch" for thread in threading.enumerate())


def looks(*stretches: tuple[float, float, float], seconds: float = 0.5) -> list[Look]:
    """A look at the start and after each stretch: seconds that threads ran, that they waited, and that others ran."""
    # Earlier times do not count, nor those of a thread that has ended.
    ran, waited, busy = 7.0, 9.0, 50.0
    found = [Look({"1": (round(ran * NS), round(waited * NS)), "ended": (NS, 90 * NS)}, busy, 0.0)]
    for number, (more_run, more_waited, others) in enumerate(stretches, 1):
        ran, waited, busy = ran + more_run, waited + more_waited, busy + more_run + others
        found.append(Look({"1": (round(ran * NS), round(waited * NS))}, busy, number * seconds))
    return found


# What counts as crowded


@pytest.mark.parametrize(
    ("ran", "waited", "others", "cores", "was", "crowded"),
    [
        (0.99, 0.002, 0.01, 2, False, False),  # two threads alone
        (0.55, 0.35, 0.45, 2, False, True),  # beside a busy process
        (0.55, 0.35, 0.45, 2, True, True),
        (0.55, 0.01, 0.45, 2, True, True),  # they sleep instead of waiting, as intended
        (0.55, 0.01, 0.45, 3, False, False),  # the other process has its own core
        (0.55, 0.35, 0.01, 2, False, False),  # they compete with each other
        (0.55, 0.35, 0.01, 2, True, False),  # the other process has ended; the scheduler makes them share a core
        (0.8, 0.2, 0.2, 2, False, False),  # slightly crowded: nothing changes
        (0.8, 0.2, 0.2, 2, True, True),
        (0.01, 0.03, 0.9, 2, False, False),  # too little work to tell
        (0.01, 0.0, 0.0, 2, True, True),
    ],
)
def test_threads_that_wait_for_cores_which_others_use_are_crowded(
    ran: float, waited: float, others: float, cores: int, was: bool, crowded: bool
) -> None:
    before, now = looks((ran, waited, others))
    assert is_crowded(before, now, threads=2, cores=cores, was=was) is crowded


@pytest.mark.parametrize(("cores", "threads", "team"), [(2, 2, 2), (8, 4, 6), (2, 4, 2)])
def test_the_team_that_sleeps_makes_one_thread_more_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, team: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    library: Any = FakeLibgomp()
    with ShortSpin(library, threads):
        assert library.teams == [team]
        assert library.masters[0] is not threading.current_thread() and library.masters[0].is_alive()
    assert not library.masters[0].is_alive()  # libgomp ends a team together with its master


@pytest.mark.skipif(sys.platform != "linux", reason="the number of cores is asked of Linux")
def test_a_watch_changes_over_and_back_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_cores", lambda: 2)
    library: Any = FakeLibgomp()
    watch = SpinWatch(library, 2)
    alone, beside = (1.0, 0.0, 0.0), (0.6, 0.4, 0.4)
    seen = []
    for before, now in pairwise(looks(alone, beside, beside, alone, beside)):
        watch.decide(before, now)
        seen.append((watch.crowded, len(library.teams)))
    assert seen == [(False, 0), (True, 1), (True, 1), (False, 1), (True, 2)]
    watch.start()
    watch.stop()
    assert not watch.crowded and not any(master.is_alive() for master in library.masters)


# When threads are watched


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLibgomp:
    """A process of two threads with libgomp, without any of its settings."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", openmp.SWITCH):
        monkeypatch.delenv(name, raising=False)
    library = FakeLibgomp()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(openmp, "openmp_runtime", lambda: Path("/lib/libgomp.so.1"))
    monkeypatch.setattr(openmp, "look", lambda: looks()[0])
    load = ctypes.CDLL
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name, **mode: library if name == "/lib/libgomp.so.1" else load(name, **mode)
    )
    monkeypatch.setattr(openmp.sys, "platform", "linux")
    return library


def test_one_watch_at_a_time_until_its_work_ends(fake: FakeLibgomp) -> None:
    environment = dict(os.environ)
    with spinning_while_alone():
        assert watching()
        with spinning_while_alone():
            assert [thread.name for thread in threading.enumerate()].count("sbft-spin-watch") == 1
        assert watching()
    assert not watching()
    with pytest.raises(KeyError), spinning_while_alone():
        raise KeyError
    assert not watching() and dict(os.environ) == environment


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000"), (openmp.SWITCH, "0")]
)
def test_what_the_environment_says_is_left_alone(
    fake: FakeLibgomp, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with spinning_while_alone():
        assert not watching()


def test_there_is_no_watch_where_nothing_would_be_won(fake: FakeLibgomp, monkeypatch: pytest.MonkeyPatch) -> None:
    with spinning_while_alone("cuda"):
        assert not watching()
    for module, name, value in (
        (torch, "get_num_threads", lambda: 1),
        (openmp, "openmp_runtime", lambda: Path("/lib/libomp.so")),
        (openmp, "openmp_runtime", lambda: None),
        (openmp, "look", lambda: None),
        (openmp.sys, "platform", "darwin"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with spinning_while_alone():
                assert not watching(), name
    with spinning_while_alone():
        assert watching()


def test_training_and_evaluation_are_watched(fake: FakeLibgomp, tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(watching())

    model = tiny_model()
    arguments = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    row = torch.arange(8)
    SmallBatchTrainer(model, arguments, None, [{"input_ids": row, "labels": row}], callbacks=[Look()]).train()
    assert seen == [True] and not watching()
    with evaluating(model):
        assert watching()
    assert not watching()


# On the real runtime


@on_libgomp
def test_libgomp_spins_less_within_and_computes_the_same() -> None:
    code = """
        import ctypes, json, os, subprocess, sys, time
        import torch
        from sbft.native.openmp import ShortSpin, is_crowded, look, openmp_runtime

        library, cores = ctypes.CDLL(str(openmp_runtime())), os.sched_getaffinity(0)
        values = torch.rand(1 << 18)

        def measured():
            '''Processor time in which threads mostly wait for the next piece of work, and the work's result.'''
            total = values.sin().sum()
            begin = time.process_time()
            for _ in range(10):
                values.sin()
                time.sleep(0.02)
            return time.process_time() - begin, total.item(), torch.get_num_threads()

        found = [measured()]
        for _ in range(2):
            with ShortSpin(library, torch.get_num_threads()):
                found.append(measured())
            time.sleep(0.05)
            found.append(measured())

        one = {min(cores)}
        os.sched_setaffinity(0, one)
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        time.sleep(0.5)
        before, end = look(), time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass
        crowded = is_crowded(before, look(), threads=1, cores=1, was=False)
        for other in others:
            other.kill()
        print(json.dumps([found, crowded]))
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**environment, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, crowded = json.loads(done.stdout)
    long, short = [spun for spun, *_ in found[0::2]], [spun for spun, *_ in found[1::2]]
    if len(os.sched_getaffinity(0)) > 1:  # on one core, two threads are too many from the start
        assert max(short) < 0.5 * min(long), found
    assert len({total for _, total, _ in found}) == 1 and {threads for *_, threads in found} == {2}
    assert crowded  # another process shared its core
