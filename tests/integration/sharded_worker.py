"""Training of tiny models, FSDP2 over as many processes as the environment says; run by test_sharded_training.py.

`torchrun -m tests.integration.sharded_worker FOLDER` writes what each case came to into FOLDER/CASE.pt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from sbft.errors import ModelError
from sbft.optim.sharding import is_sharded, whole
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

STEPS, BATCH = 4, 4


@dataclass(frozen=True)
class Case:
    """One model and how it is trained; hidden size 128 makes its matrices factored ones."""

    kind: str
    tied: bool
    vocab: int
    optimizer: str = "adafactor"
    release: bool = True


CASES = {
    "rows that do not divide": Case("qwen3", False, 513),
    "tied embeddings": Case("llama", True, 512),
    # Adafactor divides a gradient by its own size, and of this model some are nothing but rounding.
    "a soft cap": Case("gemma3", True, 512, "sgd"),
    "gradients kept": Case("llama", False, 512, release=False),
}
REFUSED, _UNEVEN = "tied and uneven", Case("llama", True, 513)


def save_models(folder: Path) -> None:
    for name, case in {**CASES, REFUSED: _UNEVEN}.items():
        model = tiny_model(case.kind, tied=case.tied, vocab=case.vocab, hidden=128, dtype=torch.float32)
        model.save_pretrained(folder / name)


def train(name: str, folder: Path, processes: int) -> dict[str, Any]:
    """What a case comes to: its weights, whole, and what the trainer has counted."""
    case = _UNEVEN if name == REFUSED else CASES[name]
    arguments = SmallBatchTrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        use_cpu=True,
        token_optimizer=case.optimizer,
        gradient_release=case.release,
        learning_rate=1e-2 if case.optimizer == "adafactor" else 0.1,
        stochastic_rounding=False,
        cast_weights=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    sharding = DistributedConfig(fsdp_size=processes) if processes > 1 else None
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, distributed_config=sharding)
    # Lengths differ, so that the ranks have different numbers of labels.
    generator = torch.Generator().manual_seed(0)
    lengths = [9 + 3 * (i % 5) for i in range(STEPS * BATCH)]
    rows = [{"input_ids": torch.randint(3, case.vocab, (length,), generator=generator).tolist()} for length in lengths]
    trainer = SmallBatchTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=_pad)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "sharded": sum(is_sharded(parameter) for parameter in model.parameters()),
        "parameters": len(list(model.parameters())),
        "logits_free": trainer._head is not None,
        "tokens": trainer.tokens_seen,
        "losses": [float(entry["loss"]) for entry in logged],
        "norms": [float(entry["grad_norm"]) for entry in logged],
        "weights": {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()},
    }


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(value: int, fill: int) -> torch.Tensor:
        filled = [row["input_ids"] if value < 0 else [value] * len(row["input_ids"]) for row in rows]
        return torch.tensor([one + [fill] * (longest - len(one)) for one in filled])

    return {"input_ids": padded(-1, 2), "attention_mask": padded(1, 0), "labels": padded(-1, -100)}


def refusal(folder: Path, processes: int) -> str:
    """What is said of tied embeddings whose rows do not divide by the processes."""
    try:
        train(REFUSED, folder, processes)
    except ModelError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    target = Path(sys.argv[1])
    from accelerate import PartialState

    state = PartialState(cpu=True)
    for case_name in CASES:
        result = train(case_name, target, state.num_processes)
        if state.is_main_process:
            torch.save(result, target / f"{case_name}.pt")
    said = refusal(target, state.num_processes)
    (target / f"refusal-{state.process_index}.txt").write_text(said)
    state.destroy_process_group()
