"""What `show_facts` printed, without its line breaks."""

from __future__ import annotations


def unwrapped(text: str) -> list[str]:
    """Each fact on one line; a value that goes on below its name follows it."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("  ") and lines:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return lines
