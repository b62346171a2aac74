"""Rewrites plain encyclopedia text in the raw form of WikiText."""

from __future__ import annotations

import re

HEADING = re.compile(r"^[A-Z0-9][^.!?]{0,60}\.$")
RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"[\u201c\u201d]"), '"'),
    (re.compile(r"[\u2018\u2019]"), "'"),
    (re.compile(r"(?<=\d),(?=\d)"), " @,@ "),
    (re.compile(r"(?<=\d)\.(?=\d)"), " @.@ "),
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "),
    (re.compile(r"(?<=\d)\u2013(?=\d)"), " \u2013 "),
    (re.compile(r"(?<=\w)'(?=(?:s|t|re|ve|ll|d|m)\b)"), " '"),
    (re.compile(r'(?<!@)([,;:?!()\[\]"—$%£€])(?!@)'), r" \1 "),
    (re.compile(r"\.{3}"), " ... "),
    (re.compile(r"(?<=[\w'\")\]])\.(?=\s+[\"'(]?\s*[A-Z])"), " ."),
    (re.compile(r"\.\s*$"), " . "),
    (re.compile(r"\.(?= [\")])"), " ."),
    (re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|No|Vol|vs|Lt|Col|Gen|Capt|[A-Z]) \."), r"\1."),
    (re.compile(r"\s+"), " "),
)


def spaced(line: str) -> str:
    """One line with spaces round its punctuation and one at either end."""
    for pattern, replacement in RULES:
        line = pattern.sub(replacement, line)
    return f" {line.strip()} "


def to_wikitext(text: str) -> str:
    """An article (title, blank line, paragraphs; `Heading.` lines) in WikiText's raw form."""
    title, _, body = text.partition("\n")
    lines = [" ", f" ={spaced(title)}= ", " "]
    for line in filter(None, (line.strip() for line in body.split("\n"))):
        if HEADING.match(line) and len(line.split()) <= 8:
            lines += [" ", f" = ={spaced(line[:-1])}= = ", " "]
        else:
            lines.append(spaced(line))
    return "\n".join(lines) + "\n"
