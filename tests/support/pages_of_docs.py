"""What the Markdown pages hold: fenced blocks, command lines in them, and the parameters that a command line takes.

A fence's info string says what its block is. Renderers show none of it:

    ```sh             commands; the tests run them beside a demo bundle
    ```console        `$ ` and a command, then what it prints; run too, and the output compared
    ```sh no-run      commands that a test can't run (GPU, cluster, downloads, minutes): only options are checked
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OURS = ("mdnet", "mdnet-export", "mdnet-rt")
_OPERATORS = ("|", "||", "&", "&&", ";", ">", "<", "(", ")")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    run: bool
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in ("sh", "console")

    def steps(self) -> list[tuple[str, str | None]]:
        """Command and expected output (None where the page shows none), in order."""
        if self.language == "sh":
            return [(self.text, None)]
        steps = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            end = next(i for i, line in enumerate(lines) if not line.endswith(("\\", "|"))) + 1
            steps.append(("\n".join(lines[:end]), "\n".join(lines[end:])))
        return steps


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], "no-run" not in found[2].split(), found[3])
        for found in _FENCE.finditer(text)
    ]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def command_lines(page: str) -> Iterator[tuple[str, list[str]]]:
    """Every command of ours on a page, in blocks and in `code`: where it is, and its words."""
    for block in blocks(page):
        if block.is_shell:
            for command, _ in block.steps():
                yield from ((str(block), words) for words in _split(command))
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.match(r"(mdnet|mdnet-rt|mdnet-export|make|python benchmarks/\S+) ", code):
            yield from ((f"{page}: {code}", words) for words in _split(code))


def _split(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in _OPERATORS:
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def problem(words: list[str]) -> str:
    """What is wrong with a command line: an unknown subcommand, option or choice; empty if nothing, or not ours."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        unknown = [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word) and word not in targets]
        return f"make has no target {unknown}" if unknown else ""
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        unknown = [word for word in words[2:] if word.startswith("-") and f'"{word}"' not in source]
        return f"{words[1]} has no option {unknown}" if unknown else ""
    if words[0] not in _OURS:
        return ""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
    command: click.Command = script.load()
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        if rest[0].startswith("-"):
            rest = rest[1:]
            continue
        if rest[0] not in command.commands:
            return f"{words[0]} has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {name: each for each in command.params for name in (*each.opts, *each.secondary_opts)}
    options |= {flag: click.Option([flag], is_flag=True) for flag in ("-h", "--help", "--debug")}
    while rest:
        word, rest = rest[0], rest[1:]
        if not word.startswith("-") or word == "-":
            continue
        name, equals, value = word.partition("=")
        if name not in options:
            return f"{' '.join(words[:2])} has no option {name}"
        option = options[name]
        if getattr(option, "is_flag", False):
            continue
        value, rest = (value, rest) if equals else (rest[0] if rest else "", rest[1:])
        placeholder = not value or not re.search("[a-z]", value)
        if isinstance(option.type, click.Choice) and not placeholder and value not in option.type.choices:
            return f"{name} takes {', '.join(option.type.choices)}, not {value}"
    return ""


def stable(text: str) -> str:
    """Output without what differs between machines and runs: numbers, digests, backends, spaces in tables."""
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HASH", text)
    text = re.sub(r"[-+−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\bnan\b", "N", text)
    text = re.sub(r"\b(onnxruntime-cpu|openvino(-bf16)?)\b", "BACKEND", text)
    text = re.sub(r"encoder BACKEND, vim BACKEND, fusion BACKEND", "BACKEND", text)
    text = re.sub(r"[━─]+", "─", text)
    return "\n".join(re.sub(r"[ \t]+", " ", line).strip() for line in text.strip().splitlines())


def matches(expected: str, printed: str) -> bool:
    """Whether output is the page's; `…` on the page stands for anything."""
    pattern = ".*".join(re.escape(part) for part in stable(expected).split("…"))
    return re.fullmatch(pattern, stable(printed), re.DOTALL) is not None
