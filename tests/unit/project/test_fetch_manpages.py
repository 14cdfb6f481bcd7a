"""Manual pages as text: the content stays, the markup is removed, and no page or passage is in two parts of the data."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

PAGE = r""".\" -*- coding: UTF-8 -*-
.TH LS 1 "September 2022" "GNU coreutils 9.1" "Dienstprogramme für Benutzer"
.SH BEZEICHNUNG
ls \- Verzeichnisinhalte auflisten
.SH ÜBERSICHT
\fBls\fP [\fI\,OPTION\/\fP]…
.SH BESCHREIBUNG
.PP
Die Einträge werden alphabetisch sortiert, falls
weder \fB\-c\fP noch \fB\-\-sort\fP angegeben wurden.
.TP
\fB\-a\fP, \fB\-\-all\fP
Einträge nicht ignorieren,
die mit \(Fo.\(Fc beginnen
.PP
Siehe
.BR stat (2)
und \[u00E4]hnliche.
.EX
ls \-l
  echo \e0
.EE
.SH ÜBERSETZUNG
Die deutsche Übersetzung wurde von Helge Kreutzmann erstellt.
"""
TEXT = """BEZEICHNUNG
ls - Verzeichnisinhalte auflisten

ÜBERSICHT
ls [OPTION]…

BESCHREIBUNG
Die Einträge werden alphabetisch sortiert, falls weder -c noch --sort angegeben wurden.
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("fetch_manpages")


@pytest.mark.parametrize("groff", [True, False], ids=["groff", "without"])
def test_a_page_is_its_text(script: ModuleType, groff: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if groff and shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    if not groff:
        monkeypatch.setattr(script.shutil, "which", lambda tool: None)
    text = script.plain_text(PAGE)
    lines = text.splitlines()
    start = "\n".join(line for line in lines if line)
    assert start.startswith("\n".join(line for line in TEXT.splitlines() if line))
    assert "Einträge nicht ignorieren, die mit «.» beginnen" in text
    assert "Siehe stat(2) und ähnliche." in lines
    assert lines[lines.index("ls -l") + 1] == r"echo \0"
    assert "Kreutzmann" not in text and "September" not in text and "\\f" not in text


def test_passages_are_whole_paragraphs_where_these_are_short_enough(script: ModuleType) -> None:
    assert script.passages("aa bb\n\ncc\n\ndd dd dd\nee", 10) == ["aa bb\n\ncc", "dd dd dd", "ee"]
    assert script.passages("aa bb cc dd", 6) == ["aa bb", "cc dd"]
    assert script.passages("short\n\ntext", 100) == ["short\n\ntext"]


def test_no_page_and_no_passage_is_in_two_parts(script: ModuleType, tmp_path: Path) -> None:
    pages = {f"page{n}.1": f"NAME\npage{n} - number {n}\n\nCOPYRIGHT\nThis is free software." for n in range(200)}
    sizes = script.write_parts(pages, tmp_path, 40)
    rows = {part: [json.loads(line) for line in (tmp_path / f"{part}.jsonl").open()] for part in script.PARTS}
    texts = [row["text"] for part in rows.values() for row in part]
    assert len(texts) == len(set(texts)) == 201  # the notice occurs once, in the test part
    assert rows["test"][1]["text"] == "COPYRIGHT\nThis is free software."
    names = [{row["page"] for row in part} for part in rows.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 200 and all(names)
    assert sizes["train"] == sum(len(row["text"].encode()) for row in rows["train"])


def test_links_to_other_pages_are_left_out(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "man1").mkdir()
    for name, source in {"ls.1": PAGE, "dir.1": ".so man1/ls.1\n"}.items():
        (tmp_path / "man1" / f"{name}.gz").write_bytes(gzip.compress(source.encode()))
    (tmp_path / "man1" / "vdir.1.gz").symlink_to("ls.1.gz")
    assert [name for name, _ in script.read_pages(tmp_path)] == ["ls.1"]


def test_licences_are_named_once(script: ModuleType) -> None:
    text = "Files: *\nLicense: GPL-3+\n\nFiles: debian/*\nLicense: GPL-3+\n\nFiles: x\nLicense: Expat\n Text of it.\n"
    assert script.licences(text) == ["GPL-3+", "Expat"]
