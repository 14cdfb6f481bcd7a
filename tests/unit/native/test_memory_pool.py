"""The CPU memory pool: what it allocates and keeps, and what the process holds. Tested in other processes, as it stays on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from sbft.native.memory_pool import pool_available

pytestmark = pytest.mark.skipif(not pool_available(), reason="no C++ compiler, or not Linux")


def run(code: str, **environment: str) -> str:
    """The output of a process that runs this code after importing torch and the pool."""
    begin = """
        import os, random, threading
        import torch
        from sbft.native.memory import PeakMemory, resident_bytes
        from sbft.native.memory_pool import pool_bytes, trim_pool, use_pool
        MIB = 1 << 20
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_two_tensors_overlap_whatever_threads_take_and_give_back() -> None:
    """Every tensor is filled with its own number, which must be unchanged when it is freed, by whichever thread."""
    run("""
        old = [torch.full((n,), 7.0) for n in (10, 20_000, 300_000)]
        assert use_pool() and use_pool()
        shared, errors = [], []
        lock = threading.Lock()

        def work(seed):
            draw = random.Random(seed)
            held = []
            try:
                for number in range(400):
                    size = int(2 ** draw.uniform(8, 21))
                    value = float(seed * 1000 + number)
                    held.append((torch.full((size,), value), value))
                    if draw.random() < 0.2:
                        with lock:
                            shared.append(held.pop(draw.randrange(len(held))))
                    while len(held) > 12:
                        tensor, value = held.pop(draw.randrange(len(held)))
                        assert tensor.data_ptr() % 64 == 0 and bool((tensor == value).all())
                    with lock:
                        taken = shared.pop(draw.randrange(len(shared))) if len(shared) > 8 else None
                    if taken is not None:
                        assert bool((taken[0] == taken[1]).all())
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not errors, errors
        assert all(bool((tensor == value).all()) for tensor, value in shared)
        assert all(bool((tensor == 7.0).all()) for tensor in old)
        del old
        shared.clear()
        found = pool_bytes()
        assert found.in_use == 0 and 0 < found.kept <= found.peak, found
    """)


def test_what_is_held_is_never_more_than_what_was_in_use() -> None:
    """Sizes that never recur: malloc would keep gaps, and a cache would keep all of them."""
    run("""
        assert use_pool()
        torch.ones(MIB).sum()  # what torch loads on its first use is none of ours
        draw = random.Random(3)
        with PeakMemory("cpu") as peak:
            held, most = [], 0
            for _ in range(600):
                held.append(torch.ones(draw.randrange(MIB // 16, 2 * MIB), dtype=torch.uint8))
                most = max(most, sum(tensor.nbytes for tensor in held))
                if len(held) > 20:
                    held.pop(draw.randrange(len(held)))
                found = pool_bytes()
                assert found.in_use + found.kept <= found.peak
        above = peak.peak_bytes - peak.baseline_bytes
        assert most <= above <= 1.05 * most + MIB, (most, above)  # of what it takes, a sixteenth may be left unused
        assert most <= found.peak <= 17 / 16 * most + 21 * 4096, (most, found)
    """)


def test_the_same_sizes_again_are_the_same_pages() -> None:
    run("""
        import resource
        assert use_pool()
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def step():
            kept = [torch.ones(size, dtype=torch.uint8) for size in (100_000, 300_000, 3 * MIB, 9 * MIB)]
        step()
        before = faults()
        [step() for _ in range(50)]
        assert faults() - before < 100, faults() - before  # 3,100 pages of 4 KiB a step
    """)


def test_trimming_gives_back_what_is_kept_and_nothing_else() -> None:
    run("""
        assert pool_bytes() is None and use_pool()
        kept, freed = torch.full((5 * MIB,), 3.0), torch.ones(40 * MIB)
        del freed
        before = resident_bytes()
        trim_pool()
        assert before - resident_bytes() > 150 * MIB
        found = pool_bytes()
        assert found.kept == 0 and found.in_use == found.peak == kept.nbytes
        small = torch.ones(1000)
        assert pool_bytes() == found and bool((kept == 3.0).all())
    """)


def test_a_forked_process_goes_on_with_it_though_other_threads_were_in_it() -> None:
    run("""
        assert use_pool()
        # A fork amid another thread's first call would leave a lock of torch's own taken, with the pool or without.
        assert bool((torch.full((MIB,), 2.0) == 2.0).all())
        torch.empty(MIB)
        stop = threading.Event()

        def churn():
            while not stop.is_set():
                torch.empty(MIB)

        thread = threading.Thread(target=churn)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                ok = bool((torch.full((MIB,), 2.0) == 2.0).all())
                os._exit(0 if ok else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        thread.join()
    """)


def test_no_memory_is_torchs_error_and_leaves_the_pool_usable() -> None:
    run("""
        import resource
        assert use_pool()
        kept = torch.ones(64 * MIB, dtype=torch.uint8)
        del kept
        held = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (held + 32 * MIB, resource.RLIM_INFINITY))
        whole = torch.ones(80 * MIB, dtype=torch.uint8)  # fits only when what is kept goes
        try:
            torch.ones(500 * MIB, dtype=torch.uint8)
        except RuntimeError as error:
            assert "can't allocate memory" in str(error), error
        else:
            raise AssertionError("500 MiB came from nowhere")
        assert whole[::MIB].sum() == 80 and torch.ones(MIB).sum() == MIB
    """)


def test_the_profiler_sees_what_it_gives() -> None:
    run("""
        assert use_pool()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.empty(3 * MIB, dtype=torch.uint8)
        assert any(event.self_cpu_memory_usage == 3 * MIB for event in profile.key_averages()), profile.key_averages()
    """)


def test_it_can_be_switched_off() -> None:
    run("assert not use_pool() and pool_bytes() is None and trim_pool() is None", SBFT_MEMORY_POOL="0")


def test_without_a_compiler_there_is_none() -> None:
    run(
        "assert not use_pool() and pool_bytes() is None; torch.ones(MIB)",
        PATH="",
        CXX="",
        SBFT_CACHE="/nonexistent/sbft",
    )
