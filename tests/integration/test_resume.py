"""A run that is killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 9

# Dropout and several epochs, so that random states and the order of examples have to be restored too.
SCRIPT = """
import os, signal, sys
import torch
from datasets import Dataset
from transformers import TrainerCallback
from sbft.data.collate import Collator
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

folder, kill_after, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
generator = torch.Generator().manual_seed(3)
ids = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (5, 9, 7, 12)]
rows = Dataset.from_dict({"input_ids": ids, "labels": ids})


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


args = SmallBatchTrainingArguments(
    output_dir=folder, use_cpu=True, max_steps=int(sys.argv[4]), save_steps=2, report_to=[], learning_rate=1e-2,
    lr_scheduler_type="linear", seed=5, disable_tqdm=True,
)
trainer = SmallBatchTrainer(
    model=tiny_model("gpt2", hidden=128), args=args, train_dataset=rows, data_collator=Collator(2), callbacks=[Kill()]
)
trainer.train(resume_from_checkpoint=resume)
assert trainer.tokens_seen == trainer._token_optimizer.tokens_seen
trainer.save_model(folder)
torch.save(trainer._token_optimizer.state_dict(), folder + "/optimizer.pt")
"""


def _run(folder: Path, kill_after: int = -1, resume: bool = False) -> int:
    begin = "resume" if resume else "begin"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(kill_after), begin, str(STEPS)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120).returncode


def _assert_equal(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            _assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            _assert_equal(found[i], value, f"{where}.{i}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def test_killed_and_resumed_is_as_if_never_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _run(whole) == 0
    assert _run(killed, kill_after=7) == -signal.SIGKILL
    assert (killed / "checkpoint-6").is_dir() and not (killed / "model.safetensors").exists()
    assert _run(killed, resume=True) == 0
    _assert_equal(load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors"), "model")
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (killed, whole)]
    _assert_equal(states[0], states[1], "optimizer")
    clock = states[1]["param_groups"][0]["clock"]
    assert clock["steps"] == STEPS and clock["tokens_seen"] > 0
