"""Fetch manual pages of Debian in several languages, as text to train on and to measure: the data of suite `languages`.

    python scripts/fetch_manpages.py --to runs/languages-data

The packages come from the machine's own apt sources, and nothing is installed. For each language there are train.jsonl,
validation.jsonl and test.jsonl, with one passage of a page in each row: {"text": ..., "page": "ls.1"}. A hash of a page's name
decides where it goes, so that a page is in the same part in every language. SOURCES.json names packages, versions and licences.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = {
    "en": ("manpages", "manpages-dev"),
    "de": ("manpages-de",),
    "fr": ("manpages-fr", "manpages-fr-dev"),
    "pl": ("manpages-pl", "manpages-pl-dev"),
}
PARTS = ("test", "validation", "train")
"""In the order in which a passage that several pages have is given away: it is in the first of them alone."""
TRANSLATORS = {"ÜBERSETZUNG", "TRADUCTION", "TŁUMACZENIE"}
"""Headings of a section that is the same in all pages of a language."""
_ONE_IN = 20
# Tables and equations; no hyphenation, no justification, a paragraph on a line; no colours, overstriking or underlining.
_GROFF = [
    "groff",
    "-Kutf8",
    "-Tutf8",
    "-t",
    "-e",
    "-mandoc",
    "-rHY=0",
    "-dAD=l",
    "-rLL=1000n",
    "-P-c",
    "-P-b",
    "-P-u",
    "-P-o",
]
_HYPHENS = str.maketrans({"\u2010": "-", "\u2212": "-", "\u00ad": None, "\u00a0": " "})
_FRAMES = re.compile("[\u2500-\u257f]+")
_CHARACTERS = {
    "aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "Fo": "«", "Fc": "»", "hy": "-", "en": "–", "em": "—",
    "bu": "•", "co": "©", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "ss": "ß", "mu": "×", "->": "→", "<-": "←", "<=": "≤",
    ">=": "≥", "+-": "±", "Bq": "„", "Po": "£", "de": "°", "at": "@", "sh": "#", "ba": "|", "br": "|",
}  # fmt: skip
_PLAIN = {
    "\\e": "\\(rs",
    "\\-": "-",
    "\\~": " ",
    "\\ ": " ",
    "\\0": " ",
    "\\t": " ",
    "\\'": "´",
    "\\`": "`",
    "\\.": ".",
}
_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)")
_MOTION = re.compile(
    r"\\[hvswkoxlLDNZ]'[^']*'|\\s[+-]?\d+|\\[mMF]\[[^\]]*\]|\\\*(?:\[[^\]]*\]|\(..|.)|\\[,/&|^%:cdurpa{}]|\\$"
)
_NAMED = re.compile(r"\\\[([^\]]+)\]|\\\((..)")
_TEXT_MACROS = {"B", "I", "R", "SM", "SB", "BR", "BI", "RB", "RI", "IB", "IR", "SH", "SS", "IP", "UR", "MT", "SY", "OP"}
_ALTERNATING = {"BR", "BI", "RB", "RI", "IB", "IR"}
_NEW_PARAGRAPHS = {"PP", "P", "LP", "SH", "SS", "sp"}
_BREAKS = {*_NEW_PARAGRAPHS, "TP", "TQ", "HP", "IP", "br", "nf", "fi", "EX", "EE", "RS", "RE", "SY", "YS", "in"}


def main() -> None:
    """Fetch the languages that the command line names."""
    parser = argparse.ArgumentParser(description="Fetch Debian's manual pages as passages of text.")
    parser.add_argument("--to", type=Path, required=True, help="folder for the files, which is made")
    parser.add_argument("--languages", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--longest", type=int, default=1000, help="characters of a passage")
    options = parser.parse_args()
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        sys.exit(
            f"{' and '.join(missing)} not found: the pages are packages of Debian. Run this on Debian or Ubuntu, such as in a "
            "container, and copy the files."
        )
    options.to.mkdir(parents=True, exist_ok=True)
    sources = options.to / "SOURCES.json"
    about = json.loads(sources.read_text(encoding="utf-8")) if sources.exists() else {}
    for language in options.languages:
        with tempfile.TemporaryDirectory() as folder:
            about[language] = fetch(language, Path(folder), options.to / language, options.longest)
        print(f"{language}: {about[language]['pages']} pages, {about[language]['bytes']} in {options.to / language}")
        sources.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fetch(language: str, work: Path, to: Path, longest: int) -> dict[str, object]:
    """Fetch and unpack a language's packages into `work`, and write its passages to the folder `to`.

    Returns:
        What SOURCES.json says of the language.
    """
    # Packages that a release does not have (the -dev pages were merged) are left out.
    packages = [name for name in PACKAGES[language] if _output("apt-cache", "show", "--no-all-versions", name)]
    if not packages:
        sys.exit(f"apt knows none of the packages {', '.join(PACKAGES[language])}. Type: apt-get update")
    done = subprocess.run(["apt-get", "download", *packages], cwd=work, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"apt-get could not download {', '.join(packages)}: {done.stderr.strip()}")
    archives = sorted(work.glob("*.deb"))
    for archive in archives:
        subprocess.run(["dpkg-deb", "-x", archive, work / "root"], check=True)
    described = {}
    for archive in archives:  # of which one may link to the copyright file of another
        name, version = _output("dpkg-deb", "-f", str(archive), "Package", "Version").splitlines()
        package = name.removeprefix("Package: ")
        described[package] = {
            "version": version.removeprefix("Version: "),
            "licences": licences((work / "root/usr/share/doc" / package / "copyright").read_text(encoding="utf-8")),
        }
    root = work / "root/usr/share/man"
    folder = root if language == "en" else root / language
    pages = dict(read_pages(folder))
    counts = write_parts(pages, to, longest)
    cleaner = _output("groff", "--version").splitlines()[0] if shutil.which("groff") else "scripts/fetch_manpages.py"
    return {"packages": described, "pages": len(pages), "bytes": counts, "longest": longest, "made plain by": cleaner}


def read_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields name and plain text of each page of the sections man1 to man9; links to other pages are left out."""
    for path in sorted(folder.glob("man[1-9]*/*.gz")):
        if path.is_symlink():
            continue
        source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        if source.lstrip().startswith(".so "):
            continue
        text = plain_text(source)
        if text:
            yield path.name.removesuffix(".gz"), text


def plain_text(source: str) -> str:
    """A page without markup, one paragraph a line, without header, footer and the section on its translators."""
    return tidy(_by_groff(source) if shutil.which("groff") else without_markup(source))


def _by_groff(source: str) -> str:
    done = subprocess.run(_GROFF, input=source.encode(), capture_output=True, check=True)
    lines = done.stdout.decode("utf-8", errors="replace").strip("\n").splitlines()
    return "\n".join(lines[1:-1])  # what is between header and footer


def without_markup(source: str) -> str:
    """The text of a page in the macros of man, without groff: paragraphs are filled, tables and macros' conditions left out."""
    lines: list[str] = []
    paragraph: list[str] = []
    filled, skipped_until = True, ""

    def close() -> None:
        if paragraph:
            lines.append(" " + " ".join(paragraph))
            paragraph.clear()

    for line in source.splitlines():
        if skipped_until:
            skipped_until = "" if line.startswith(skipped_until) else skipped_until
            continue
        if line.startswith((".", "'")):
            name, _, rest = line[1:].strip().partition(" ")
            if name in {"TS", "EQ", "ig", "de", "am"}:
                skipped_until = {"TS": ".TE", "EQ": ".EN"}.get(name, "..")
            if name in _BREAKS:
                close()
            if name in _NEW_PARAGRAPHS:
                lines.append("")
            filled = True if name in {"fi", "EE"} else False if name in {"nf", "EX"} else filled
            if name not in _TEXT_MACROS or not rest:
                continue
            words = [quoted or plain for quoted, plain in re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)]
            text = ("" if name in _ALTERNATING else " ").join(words[:1] if name == "IP" else words)
        else:
            text, name = line, ""
        text = without_escapes(text)
        if name == "SH":
            lines.append(text)  # alone at the margin, as groff has it
        elif name in {"SS", "IP", "SY"}:
            lines.append(" " + text)
        elif not text.strip():
            close()
            lines.append("")
        elif filled:
            paragraph.append(text.strip())
        else:
            lines.append(" " + text)
    close()
    return "\n".join(lines)


def without_escapes(text: str) -> str:
    r"""A line of a page without escapes: comments, fonts and motions go; \-, \(aq and \[u00E4] become their characters."""
    text = re.sub(r'\\["#].*', "", text)
    for escape, character in _PLAIN.items():
        text = text.replace(escape, character)
    text = _MOTION.sub("", _FONT.sub("", text))
    return _NAMED.sub(lambda found: _character(found[1] or found[2]), text)


def _character(name: str) -> str:
    if re.fullmatch(r"u[0-9A-F]{4,6}", name):
        return chr(int(name[1:], 16))
    return _CHARACTERS.get(name, "")


def tidy(text: str) -> str:
    """Plain text with one space between words, at most one empty line, and no section on translators."""
    kept: list[str] = []
    skipping = False
    for raw in _FRAMES.sub(" ", text.translate(_HYPHENS)).splitlines():
        line = " ".join(raw.split())
        if raw[:1].strip():  # a heading stands at the margin
            skipping = line in TRANSLATORS
        if not skipping and (line or (kept and kept[-1])):
            kept.append(line)
    return "\n".join(kept).strip()


def passages(text: str, longest: int) -> list[str]:
    """A page in passages of at most `longest` characters: of whole paragraphs, else of lines, else of words."""
    return _joined(text, ("\n\n", "\n", " "), longest)


def _joined(text: str, separators: tuple[str, ...], longest: int) -> list[str]:
    if len(text) <= longest or not separators:
        return [text]
    separator, *finer = separators
    found: list[str] = []
    for part in text.split(separator):
        if found and len(found[-1]) + len(separator) + len(part) <= longest:
            found[-1] += separator + part
        else:
            found += _joined(part, tuple(finer), longest)
    return found


def part_of(page: str) -> str:
    """The part that a page belongs to: of 20 pages one is for the test, one for validation."""
    number = int(hashlib.sha256(page.encode()).hexdigest()[:8], 16) % _ONE_IN
    return PARTS[min(number, 2)]


def write_parts(pages: dict[str, str], to: Path, longest: int) -> dict[str, int]:
    """Write one file for each part; no passage is in two of them, or twice in one.

    Returns:
        UTF-8 bytes of text by part.
    """
    to.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    sizes = {}
    for part in PARTS:
        rows = list(_new_rows(((page, text) for page, text in pages.items() if part_of(page) == part), longest, seen))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (to / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        sizes[part] = sum(len(row["text"].encode()) for row in rows)
    return sizes


def _new_rows(pages: Iterable[tuple[str, str]], longest: int, seen: set[str]) -> Iterator[dict[str, str]]:
    for page, text in pages:
        for passage in passages(text, longest):
            key = " ".join(passage.split()).casefold()
            if key not in seen:
                seen.add(key)
                yield {"text": passage, "page": page}


def licences(copyright_file: str) -> list[str]:
    """The licences that a package's copyright file names, that of most files first."""
    return list(dict.fromkeys(re.findall(r"^License: *(\S.*)$", copyright_file, re.MULTILINE)))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
