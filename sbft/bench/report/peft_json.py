"""Results in the JSON schema of PEFT's public method comparison (its repository, method_comparison/MetaMathQA).

There is one file for each test run. What sbft does not measure, or measures differently, is null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sbft.bench.report.comparison import Comparison, Row
from sbft.bench.suite_runs import model_folder
from sbft.recipe.methods import METHODS
from sbft.runs.record import RunRecord

_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_peft_json(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the finished test runs of a suite into a folder, which is made if needed.

    Returns:
        Paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for row in comparison.rows:
        for made in row.tested:
            if made.record is None:
                continue
            run = made.run
            name = f"{row.method}/{model_folder(run.model)}-{run.task}-{run.variant}-lr_{run.learning_rate:g}-seed_{run.seed}"
            path = folder / f"{name.replace('/', '--')}.json"
            content = _content(name, row, made.record)
            path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            files.append(path)
    return files


def _content(name: str, row: Row, record: RunRecord) -> dict[str, Any]:
    on_gpu = record.memory_kind == "cuda_allocated"
    return {
        "run_info": {
            "created_at": record.started_at,
            "total_time": record.total_s,
            "experiment_name": name,
            "peft_branch": None,
            "train_config": _train_config(record),
            "peft_config": _peft_config(record) if row.is_adapter else None,
            "error_msg": record.error or "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            # In their schema this is the peak that torch reserved, which does not exist on a CPU.
            "accelerator_memory_max": record.memory.get("reserved_peak"),
            "accelerator_memory_reserved_99th": None,
            "train_time": record.train_s,
            "file_size": record.saved_bytes,
            "num_trainable_params": record.trainable_parameters or None,
            "num_total_params": record.parameters or None,
            "status": "success" if record.status == "ok" else "failed",
            "metrics": _metrics(row, record),
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {record.dataset: {"sha": None, "created_at": None}},
            "package_info": {
                key: value
                for package in _PACKAGES
                for key, value in (
                    (f"{package}-version", record.versions.get(package)),
                    (f"{package}-commit-hash", None),
                )
            },
            "system_info": {
                "system": None,
                "release": None,
                "version": None,
                "machine": None,
                "processor": None if on_gpu else record.device,
                "accelerator": record.device if on_gpu else None,
            },
            "pytorch_info": None,
        },
    }


def _train_config(record: RunRecord) -> dict[str, Any]:
    recipe = record.recipe
    training, evaluation = recipe["training"], recipe["evaluation"]
    return {
        "model_id": record.model,
        "dtype": record.dtype,
        "max_seq_length": recipe["data"]["max_length"],
        "batch_size": record.per_device_batch_size,
        # Not in their schema, as they never accumulate gradients.
        "gradient_accumulation_steps": record.gradient_accumulation_steps,
        "batch_size_eval": evaluation["batch_size"],
        "max_steps": record.steps or None,
        "eval_steps": None,
        "compile": bool(training.get("torch_compile", False)),
        "use_gc": bool(training.get("gradient_checkpointing", False)),
        "query_template": None,
        "seed": record.seed,
        "grad_norm_clip": training.get("max_grad_norm"),
        "optimizer_type": METHODS[record.method].optimizer,
        "optimizer_kwargs": {"lr": record.learning_rate, **recipe.get("optimizer", {})},
        "lr_scheduler": training.get("lr_scheduler_type"),
        "use_amp": bool(training.get("bf16", False) or training.get("fp16", False)),
        "autocast_adapter_dtype": True if METHODS[record.method].lora_defaults is not None else None,
        "generation_kwargs": {"max_new_tokens": evaluation["max_new_tokens"]},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _peft_config(record: RunRecord) -> dict[str, Any]:
    lora = record.recipe["lora"]
    return {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "base_model_name_or_path": record.model,
        "r": lora["rank"],
        "target_modules": lora["target_modules"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "use_rslora": lora.get("rslora", False),
        "use_dora": lora.get("dora", False),
    }


def _metrics(row: Row, record: RunRecord) -> list[dict[str, Any]]:
    """The training log, with the test results as the last entry, where PEFT's code reads them."""
    logged: list[dict[str, Any]] = [
        {
            "step": entry["step"],
            "valid accuracy": None,
            "train loss": entry["loss"],
            "train samples": None,
            "train total tokens": entry["tokens"],
        }
        for entry in record.history
    ]
    if record.status != "ok":
        return logged
    packed = record.data.get("packed_into") is not None
    samples = record.steps * record.per_device_batch_size * record.gradient_accumulation_steps * record.world_size
    epochs = record.recipe["training"].get("num_train_epochs")
    whole = math.inf if epochs is None else epochs * (record.data.get("examples") or 0)
    last = {
        "step": record.steps,
        "test accuracy": record.metrics.get(row.metric) if row.is_share else None,
        "train loss": record.history[-1]["loss"] if record.history else None,
        # The last batch of an epoch may be smaller.
        "train samples": None if packed else int(min(samples, whole)),
        "train total tokens": record.tokens,
        "forgetting": None,
    }
    return [*logged, last]
