#!/usr/bin/env python
"""Runs `sbft check` on malformed recipes and data files, as many as there is time for.

    python tests/faults/fuzz.py --examples 2000 --seed 1

Each must be valid, or end with exit code 2 and a sentence. Prints how many were survived, and each that was not; exit
code 1 if any was not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    """Draw, run, count."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.fuzzing import Case, complaint, data_files, recipes
    from tests.tiny import save_tiny

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2_000, help="half of them recipes, half data files")
    parser.add_argument("--seed", type=int, help="of what is drawn; another one each time where it is not given")
    parser.add_argument("--predict", action="store_true", help="predict memory too: three times as slow")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    chosen = parser.parse_args()
    number = chosen.seed if chosen.seed is not None else time.time_ns() % 2**32
    survived: dict[str, int] = {}
    complaints: dict[str, tuple[str, str]] = {}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        model = save_tiny(Path(temporary) / "model")

        def campaign(name: str, strategy: Any) -> None:
            @seed(number)
            @settings(
                max_examples=max(chosen.examples // 2, 1),
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def one(case: Case) -> None:
                with tempfile.TemporaryDirectory(dir=temporary) as folder:
                    found = complaint(case, Path(folder), model, predict=chosen.predict)
                survived[name] = survived.get(name, 0) + (found is None)
                if found is not None and found[:60] not in complaints:
                    complaints[found[:60]] = (found, repr(case))
                    print(f"{name}: {found}\n  {case!r}\n", flush=True)

            one()

        campaign("recipes", recipes())
        campaign("data files", data_files())
    seconds = time.perf_counter() - begin
    told = ", ".join(f"{count} {name}" for name, count in survived.items())
    print(f"Survived: {told}; {len(complaints)} different complaints; seed {number}, {seconds:.0f} s")
    if chosen.output is not None:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"survived": survived, "complaints": list(complaints), "seed": number, "seconds": round(seconds)}
        chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
