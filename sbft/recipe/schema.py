"""The schema of a recipe: every key, its type, and a sentence on what it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    create_model,
)
from pydantic.fields import FieldInfo

from sbft.grid.formats import on_grids
from sbft.recipe.offload import Offload, offload_of
from sbft.recipe.settings import Setting, settings_in

WeightFormat = Literal["float32", "bfloat16", "int12", "int8", "int4", "int8/32", "int6", "int4/64"]
_Word = Annotated[str, StringConstraints(pattern=r"\S")]


def _at_least_two(labels: list[str]) -> list[str]:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError("labels must be two or more, and differ")
    return labels


def _text_keys(names: Any) -> Any:
    """YAML reads the classes 0 and 1 as numbers; a file's values are compared as text."""
    return {str(key): value for key, value in names.items()} if isinstance(names, dict) else names


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def _made_of(section: str) -> Any:
    """A section with a field for each setting that `sbft.recipe.settings` has in it."""
    fields: dict[str, Any] = {name: _field_of(setting) for name, setting in settings_in(section).items()}
    return create_model(section, __base__=_Section, **fields)


def _field_of(setting: Setting) -> tuple[Any, Any]:
    kind: Any = FiniteFloat if setting.type is float else setting.type
    limits: dict[str, Any] = {}
    if isinstance(setting.domain, tuple):
        kind = Literal[setting.domain]
    elif setting.domain is not None:
        domain = setting.domain
        limits["gt" if domain.above else "ge"] = domain.lowest
        if math.isfinite(domain.highest):
            limits["lt" if domain.below else "le"] = domain.highest
    if setting.required:
        return kind, Field(description=setting.help, **limits)
    return kind | None, Field(None, description=setting.help, **limits)


class SourceConfig(_Section):
    """Other data than the training data. Columns that are not named here are those of the data section."""

    data: _Word
    """A source like data.train: a hub id, a local file, generated:NAME or builtin:python-stdlib."""
    split: str | None = None
    """Split of a hub data set; default: train to mix in, test to watch."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    size: PositiveInt | None = None
    """Use only this many of its examples, chosen at random; a generated task makes this many."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of a generated task."""
    prompt: str | None = None
    """Column that holds the question."""
    completion: str | None = None
    """Column that holds the answer."""
    messages: str | None = None
    """Column that holds a chat."""
    text: str | None = None
    """Column that holds plain text."""


class ReplayConfig(SourceConfig):
    """Data of an old kind, mixed into the training data so that the model forgets less of it. It is drawn at random by
    data.seed, and again from its beginning where it is too small."""

    share: FiniteFloat = Field(gt=0, lt=1)
    """Its share of all tokens that an epoch trains on, such as 0.05."""


class WatchConfig(SourceConfig):
    """Other data that the loss is measured on before and after training, to see what the model forgets."""

    metrics: list[str] = Field(default_factory=list)
    """Metrics besides loss and perplexity; the first says what is forgotten. Default: bits_per_byte of plain text, else
    loss."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens; default: evaluation.max_new_tokens."""


class DataConfig(_Section):
    """Where the examples come from, and how they become token ids."""

    train: _Word
    """Training data: a hub id, a local .jsonl, .json, .csv, .parquet or .txt file, or generated:NAME. In pretraining also
    builtin:python-stdlib, or a folder that sbft prepare-data made."""
    validation: _Word | None = None
    """Data for choosing settings and the best checkpoint. It is never trained on and never reported as the result."""
    eval: _Word | None = None
    """Data for the reported figures."""
    train_split: str = "train"
    """Split of a hub data set to train on."""
    validation_split: str = "validation"
    """Split of a hub data set to choose settings on."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    train_size: PositiveInt | None = None
    """Keep this many training examples; a generated task makes this many."""
    validation_size: PositiveInt | None = None
    """Keep this many validation examples; without a validation source they are split off from the training data."""
    eval_size: PositiveInt | None = None
    """Keep this many evaluation examples; a generated task makes this many."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of a generated task."""
    prompt: str = "prompt"
    """Column that holds the question."""
    completion: str = "completion"
    """Column that holds the answer; only its tokens count in the loss."""
    messages: str = "messages"
    """Column that holds a chat; only the assistant's turns count in the loss."""
    text: str = "text"
    """Column that holds plain text; every token counts in the loss."""
    max_length: PositiveInt = 1024
    """Longest example in tokens; the rest is cut off and counted. In pretraining the tokens of every example."""
    train_tokens: PositiveInt | None = None
    """Pretraining: tokens to train on, which sets training.max_steps unless that is given."""
    tokens_per_parameter: FiniteFloat | None = Field(None, gt=0)
    """Pretraining: the same, per parameter of the model; only one of the two embeddings counts."""
    packing: bool = False
    """Put several short examples into one row; they do not attend to one another."""
    chat_template: bool = True
    """Render prompt and completion as chat turns if the tokenizer has a chat template."""
    system: str | None = None
    """System message put before every chat."""
    tools: str = "tools"
    """Column that holds the functions the assistant may call, next to a chat or a question."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: true}; the default of that one follows from the data."""
    label_names: Annotated[dict[str, _Word], BeforeValidator(_text_keys), Field(min_length=1)] | None = None
    """Words that the model learns to write for the values of the completion column: {0: negative, 1: positive}."""
    allow_overlap: bool = False
    """Train even if evaluation questions are also in the training data."""
    replay: ReplayConfig | None = None
    """Data of an old kind to mix in, so that the model forgets less: {data: old.jsonl, share: 0.05}, a share of the tokens."""
    seed: NonNegativeInt = 0
    """Seed of shuffling, splitting and generated tasks."""


class OptimizerConfig(_made_of("optimizer")):  # type: ignore[misc]
    """The optimizer's settings. A key that is left out takes the method's value."""


class LoraConfig(_Section):
    """The adapter of methods lora and qlora. A key that is left out takes the method's value."""

    rank: PositiveInt | None = None
    """Rank of the adapter."""
    alpha: PositiveInt | None = None
    """The adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with rslora."""
    dropout: FiniteFloat | None = Field(None, ge=0, lt=1)
    """Dropout before the adapter."""
    rslora: bool | None = None
    """Scale by the root of the rank, so that a higher rank does not learn more slowly (arXiv 2312.03732)."""
    dora: bool | None = None
    """Train magnitude and direction of each weight column separately (arXiv 2402.09353); slower."""
    target_modules: str | list[str] | None = None
    """Names of the layers that get an adapter, or all-linear, or a regular expression for their full paths."""
    modules_to_save: list[_Word] | None = None
    """Names of layers that are trained whole beside the adapter, and saved with it, such as [embed_tokens]."""


class DistributedConfig(_Section):
    """How a model is spread over several processes, as in transformers' DistributedConfig."""

    fsdp_size: PositiveInt | None = None
    """Processes over which the weights are sharded (FSDP2); each has its own examples."""
    dp_replicate_size: PositiveInt | None = None
    """Replicas of such a group of processes."""
    tp_size: PositiveInt | None = None
    """Processes that split every matrix and work on the same examples (tensor parallelism). The number of processes is the
    product of the three."""


class BatchScheduleConfig(_made_of("batch_schedule")):  # type: ignore[misc]
    """A batch that doubles during the run, starting at training.per_device_train_batch_size. The learning rate follows the
    examples seen; half-lives in tokens need no change."""


class OffloadConfig(_Section):
    """Which layers are in the host's memory."""

    layers: PositiveInt | Literal["all", "auto"] = "all"
    """How many of the decoder's layers are streamed: a number, all, or auto for as few as fit."""
    activations: bool = False
    """Keep the layers' inputs that gradient checkpointing saves in the host's memory too."""


class EvaluationConfig(_Section):
    """What is measured before and after training."""

    metrics: list[str] = Field(default_factory=list)
    """Metrics of generated answers: exact_match, accuracy. Loss and perplexity are always measured, and bits_per_byte of
    plain text."""
    metric_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of a metric, by its name."""
    labels: Annotated[list[_Word], AfterValidator(_at_least_two)] | Literal["auto"] | None = None
    """Also score these answers by likelihood, as metric label_accuracy; auto takes all answers in the data."""
    max_new_tokens: PositiveInt = 16
    """Longest answer in tokens."""
    limit: PositiveInt | None = None
    """Evaluate only on this many examples, the first ones; in pretraining, on this many windows (default: 200)."""
    batch_size: PositiveInt = 16
    """Answers generated at once. It affects the speed and memory of evaluation, not of training."""
    before: bool = True
    """Also evaluate before training."""
    watch: dict[_Word, WatchConfig] = Field(default_factory=dict)
    """Other data to measure before and after training, by a name of yours: {english: {data: english.jsonl}}. Reports show what
    of it is forgotten."""


class Recipe(_Section):
    """One training run."""

    model: _Word
    """Hub id, local folder, builtin:NAME, scratch:SIZE for a new model to pretrain, or random:NAME for random weights in a
    known shape."""
    tokenizer: _Word | None = None
    """Tokenizer of a new model: a name, a folder, or bpe:2048 to train one on the data."""
    method: str = "sbft"
    """sbft, lora, adam, ...: sets the defaults of all other keys, each of which can be overridden."""
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: dict[str, Any] = Field(default_factory=dict)
    """Names and values of transformers' TrainingArguments."""
    batch_schedule: BatchScheduleConfig | None = None
    freeze: list[_Word] = Field(default_factory=list)
    """Weights that are not trained: patterns of parameter names such as model.layers.0.*, or the word embeddings, which
    stands for the input embedding and the output head."""
    lora: LoraConfig | None = None
    distributed: DistributedConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    output_dir: str | None = None
    """Folder for the model, the record and the predictions; default: runs/DATA-METHOD."""
    save_model: bool = True
    """Save the trained model or adapter in output_dir. If false, only the record and the predictions are saved."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of the weights, and of what is computed with them; default: that of the method."""
    weights: WeightFormat | Annotated[dict[_Word, WeightFormat], Field(min_length=1)] | None = None
    """What weights are stored in: float32, bfloat16, int12, int8 or int4; or formats by patterns of their names, such as
    {default: int4, lm_head: int8}. int8/32, int6 and int4/64 are for comparisons. Default: that of the method, or dtype."""
    offload: Literal["layers"] | OffloadConfig | None = None
    """Keep layers in the host's memory and stream them through the device: layers, for all of them; or {layers: N} for N of
    them, layers: auto for as few as fit. activations: true does the same with the layers' inputs that checkpointing saves."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model."""
    allow_pickle: bool = False
    """Load pickled weights (pytorch_model.bin, adapter_model.bin) if the model has no safetensors."""

    @property
    def grids(self) -> str | dict[str, str] | None:
        """The formats of weights on a grid, as `sbft.grid.convert.put_on_grids` takes them; None if no weight is on one."""
        return on_grids(self.weights)

    @property
    def offloaded(self) -> Offload | None:
        """What `offload` asks for; None if nothing is offloaded."""
        return offload_of(self.offload.model_dump() if isinstance(self.offload, OffloadConfig) else self.offload)

    @property
    def largest_batch(self) -> int:
        """Examples of the largest forward pass, on one process; of a resolved recipe."""
        if self.batch_schedule is not None:
            return self.batch_schedule.largest
        return int(self.training["per_device_train_batch_size"])

    def readers(self, processes: int) -> int:
        """How many of some processes have data of their own; those that share every matrix (`tp_size`) have the same."""
        shared_by = 1 if self.distributed is None else self.distributed.tp_size or 1
        return max(processes // shared_by, 1)

    def to_yaml(self) -> str:
        """The recipe as the file that would load it again."""
        return as_yaml(self.model_dump(mode="json", exclude_none=True))


SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "distributed": DistributedConfig,
    "batch_schedule": BatchScheduleConfig,
    "evaluation": EvaluationConfig,
}
"""The sections of a recipe, but for `training`, whose keys are those of TrainingArguments."""
INNER_SECTIONS: dict[tuple[str, str], type[BaseModel]] = {
    ("data", "replay"): ReplayConfig,
    ("evaluation", "watch"): WatchConfig,
}
"""Sections within sections; `evaluation.watch` holds one for each of its names."""


def fields_at(path: Sequence[str]) -> dict[str, FieldInfo]:
    """The keys of a recipe's section, by its path: () is the recipe itself."""
    if not path:
        return Recipe.model_fields
    inner = INNER_SECTIONS.get((path[0], path[1])) if len(path) > 1 else None
    return (inner or SECTIONS[path[0]]).model_fields


def as_yaml(content: dict[str, Any]) -> str:
    """The content of a recipe as its file has it."""
    return yaml.safe_dump(content, sort_keys=False, width=100)
