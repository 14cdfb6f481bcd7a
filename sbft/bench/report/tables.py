"""The tables of a comparison, as Markdown and as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sbft.bench.report import formats
from sbft.bench.report.comparison import Comparison, Row, Validation
from sbft.bench.report.parts import names_of, parts_of_row, prediction_of_row
from sbft.bench.report.statistics import Estimate, over_seeds, pareto_front
from sbft.bench.schedule import duration
from sbft.metrics import LOWER_IS_BETTER

_WARNING = "⚠"


@dataclass
class Table:
    """Rows of text. The last cell of a row that is shorter than the head spans the remaining columns."""

    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)

    def mark(self, footnote: str) -> str:
        """The mark of a footnote, which is added to the table if it is new."""
        if footnote not in self.footnotes:
            self.footnotes.append(footnote)
        return formats.superscript(self.footnotes.index(footnote) + 1)

    def notes(self) -> list[str]:
        """The footnotes, each after its mark."""
        return [f"{formats.superscript(number)} {text}" for number, text in enumerate(self.footnotes, 1)]

    def markdown(self) -> str:
        """The table as Markdown that is also readable as plain text."""
        rows = [[in_markdown(cell).replace("|", r"\|") for cell in row] for row in [self.head, *self.rows]]
        # A reason that spans the rest of its row must not widen the column that it starts in.
        whole = [row if len(row) == len(self.head) else row[:-1] for row in rows]
        widths = [max(len(row[i]) for row in whole if i < len(row)) for i in range(len(self.head))]
        rows = [row + [""] * (len(self.head) - len(row)) for row in rows]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def html(self) -> str:
        """The table as HTML."""
        lines = ["<tr>" + "".join(f"<th>{_inline(cell)}</th>" for cell in self.head) + "</tr>"]
        for row in self.rows:
            cells = [f"<td>{_inline(cell)}</td>" for cell in row]
            if len(row) < len(self.head):
                span = len(self.head) - len(row) + 1
                cells[-1] = f'<td class="reason" colspan="{span}">{_inline(row[-1])}</td>'
            lines.append("<tr>" + "".join(cells) + "</tr>")
        return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def in_markdown(text: str) -> str:
    """Escape HTML and links, so that Markdown shows them literally; bold and code keep their meaning."""
    return " ".join(text.replace("<", r"\<").replace("](", r"]\(").split())


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))


def metric_name(metric: str) -> str:
    """The name of a metric for people."""
    return metric.replace("_", " ")


def _score(row: Row) -> str:
    return _written(row, row.score) + row.seeds_short


def _written(row: Row, score: Estimate | None) -> str:
    return formats.estimate(score, 100) if row.is_share else formats.estimate(score, digits=3)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _difference(comparison: Comparison, row: Row, table: Table) -> str:
    if row.variant == comparison.suite.baseline:
        return "baseline"
    value = comparison.difference(row)
    if value is None:
        return ""
    text = formats.estimate(value, 100, signed=True) if row.is_share else formats.estimate(value, digits=3, signed=True)
    if value.over == "items":
        return f"{text} {table.mark('One seed: paired over the evaluation items, ± one standard error over them.')}"
    if value.standard_error is None:
        return f"{text} {table.mark('One seed, and no items to pair: the difference has no standard error.')}"
    return text


def _rate(row: Row, table: Table) -> str:
    text = formats.rate(row.choice.rate)
    if row.choice.rate is None:
        return text
    if row.choice.edge is not None:
        note = "The best learning rate is the {} of its grid: one beyond it may be better."
        return f"{text} {_WARNING}{table.mark(note.format(row.choice.edge))}"
    if row.taken_from is not None:
        return f"{text} {table.mark(f'The learning rate that was chosen for {row.taken_from}.')}"
    if len(row.choice.tried) < 2:
        return f"{text} {_WARNING}{table.mark('Only one learning rate was tried: another may be better.')}"
    return text


def _name(row: Row, table: Table) -> str:
    """The variant, with a footnote on failed or missing seeds."""
    failures = row.failed
    missing = [made.run.seed for made in row.tested if made.record is None]
    if not row.records or not (failures or missing):
        return row.variant
    reasons = [f"seed {seed} failed: {formats.reason(why)}" for seed, why in failures.items()]
    reasons += [f"seed {seed} not run yet" for seed in missing]
    note = f"{row.variant}: {len(row.values(row.metric))} of {len(row.tested)} seeds; {'; '.join(reasons)}."
    return f"{row.variant} {_WARNING if failures else ''}{table.mark(note)}"


def main_table(comparison: Comparison, rows: list[Row]) -> Table:
    """The comparison on one task."""
    first = rows[0]
    score = f"{metric_name(first.metric)}, %" if first.is_share else metric_name(first.metric)
    columns: list[tuple[str, Callable[[Row, Table], str]]] = [
        ("method", _name),
        ("learning rate", _rate),
        (score, lambda row, _: _score(row)),
        (f"difference to {comparison.suite.baseline}", lambda row, table: _difference(comparison, row, table)),
        ("loss", lambda row, _: formats.estimate(row.loss, digits=3)),
        *_forgetting_columns(rows),
        ("peak memory, GiB", lambda row, _: formats.gibibytes(row.peak_bytes)),
        ("above the model, MiB", lambda row, _: formats.mebibytes(row.mean(lambda r: r.memory.get("above_baseline")))),
        ("evaluation peak, GiB", lambda row, _: formats.gibibytes(row.mean(lambda r: r.memory.get("evaluation_peak")))),
        ("ms per step", lambda row, _: formats.milliseconds(row.median(lambda r: r.step_s.get("median")))),
        ("of which update", lambda row, _: formats.milliseconds(row.median(lambda r: r.optimizer_s.get("median")))),
        ("tokens/s", lambda row, _: formats.whole(row.tokens_per_s)),
        ("total time", lambda row, _: _duration(row.total_s)),
        ("trained, M", lambda row, _: formats.millions(row.mean(lambda r: r.trainable_parameters))),
        ("on disk, MiB", lambda row, _: formats.mebibytes(row.mean(lambda r: r.saved_bytes))),
    ]
    if first.metric == "loss":
        del columns[4]
    return _filled(columns, rows)


def _forgetting_columns(rows: list[Row]) -> list[tuple[str, Callable[[Row, Table], str]]]:
    """A column for each data set that the task watches."""
    watched = dict.fromkeys(name for row in rows for name in row.forgetting)
    return [(f"forgetting of {name}", partial(_forgotten, name)) for name in watched]


def _forgotten(name: str, row: Row, table: Table) -> str:
    changes = row.forgetting.get(name)
    if not changes:
        return ""
    metric = changes[0].metric
    change = over_seeds([one.change for one in changes])
    is_loss = metric in LOWER_IS_BETTER
    unit = " in nats per token" if metric == "loss" else "" if is_loss else ", in percentage points"
    mark = table.mark(
        f"Forgetting of {name}: {metric_name(metric)}{unit}, after training minus before; it has forgotten where this is "
        f"{'positive' if is_loss else 'negative'}."
    )
    text = formats.estimate(change, digits=3, signed=True) if is_loss else formats.estimate(change, 100, signed=True)
    return f"{text} {mark}"


def short_table(comparison: Comparison, rows: list[Row]) -> Table:
    """The most important columns of the comparison, for a terminal."""
    whole = main_table(comparison, rows)
    forgotten = [index for index, name in enumerate(whole.head) if name.startswith("forgetting of ")]
    columns = [0, 1, 2, 3, *forgotten, whole.head.index("peak memory, GiB"), whole.head.index("ms per step")]
    short = Table([whole.head[i] for i in columns], footnotes=whole.footnotes)
    for row in whole.rows:
        short.rows.append([row[i] for i in columns] if len(row) == len(whole.head) else row)
    return short


def _filled(columns: list[tuple[str, Callable[[Row, Table], str]]], rows: list[Row]) -> Table:
    table = Table([name for name, _ in columns])
    for row in rows:
        shortfall = row.shortfall
        if shortfall is None:
            table.rows.append([write(row, table) for _, write in columns])
        else:
            table.rows.append([row.variant, formats.rate(row.choice.rate), formats.reason(shortfall)])
    return table


def rates_table(rows: list[Row]) -> Table | None:
    """Validation scores of every learning rate that was tried; None where there was nothing to choose."""
    searched = [(row, row.validations()) for row in rows if row.searched]
    if not searched:
        return None
    longest = max(len(tried) for _, tried in searched)
    table = Table(["method", "learning rate: score", *[""] * (longest - 1)])
    for row, tried in searched:
        cells = [_validation_cell(row, one, table) for one in tried]
        table.rows.append([row.variant, *cells, *[""] * (longest - len(cells))])
    return table


def _validation_cell(row: Row, validation: Validation, table: Table) -> str:
    text = f"{formats.rate(validation.learning_rate)}: {_validation_score(row, validation, table)}"
    return f"**{text}**" if validation.learning_rate == row.choice.rate else text


def _validation_score(row: Row, validation: Validation, table: Table) -> str:
    if validation.failure is not None:
        return f"failed {table.mark(formats.reason(validation.failure))}"
    if validation.score is None:
        return "to do"
    text = _written(row, validation.score)
    return text if validation.done == validation.runs else f"{text} ({validation.done} of {validation.runs} seeds)"


def memory_table(rows: list[Row]) -> Table | None:
    """The parts of the peak memory in MiB, and the peak; None where none was measured.

    On a GPU, the peak is also given in GB, the unit that papers use. Where it was predicted before training, the prediction is
    given as well.
    """
    measured = [(row, parts) for row in rows if (parts := parts_of_row(row)) is not None]
    if not measured:
        return None
    names = names_of([row for row, _ in measured])
    # As in the picture, a part that no method has is left out.
    shown = [part for part in names if any(parts[part] > 0 for _, parts in measured)]
    in_gb = any(row.is_on_gpu for row, _ in measured)
    predicted = {row.variant: prediction_of_row(row) for row, _ in measured}
    ahead = any(predicted.values())
    table = Table(
        [
            "method",
            *(names[part] for part in shown),
            "peak",
            *(["peak, GB (10⁹ bytes)"] if in_gb else []),
            *([f"{'peak' if in_gb else 'above the model'}, predicted", "error"] if ahead else []),
        ]
    )
    for row, parts in measured:
        peak = sum(parts.values())
        cells = [formats.mebibytes(parts[part]) for part in shown]
        cells += [formats.mebibytes(peak), *([f"{peak / 1e9:.2f}"] if in_gb else [])]
        table.rows.append(
            [row.variant + row.seeds_short, *cells, *(_predicted(predicted[row.variant]) if ahead else [])]
        )
    return table


def _predicted(prediction: tuple[float, float] | None) -> list[str]:
    if prediction is None:
        return ["", ""]
    predicted, measured = prediction
    return [formats.mebibytes(predicted), f"{100 * (predicted / measured - 1):+.0f} %".replace("-", "−")]


def front(rows: list[Row]) -> list[Row]:
    """The rows on the Pareto front of score and peak memory, in ascending order of memory.

    A row with a failed seed is not on it: a mean without the failures would be unfair.
    """
    placed = [(row, row.peak_bytes, row.score) for row in rows if not row.failed]
    points = [(row, memory, score.mean) for row, memory, score in placed if memory is not None and score is not None]
    on_front = pareto_front(
        [memory for _, memory, _ in points],
        [score for _, _, score in points],
        higher_is_better=all(row.is_share for row in rows),
    )
    return [points[index][0] for index in on_front]
