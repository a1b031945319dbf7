"""Pieces of HTML; what they are given as text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def text(value: str) -> str:
    """Escapes text for an element or an attribute."""
    return html.escape(value, quote=True)


def section(title: str, *body: str) -> str:
    """A part of the page under a heading of the second level; empty without a body."""
    content = "\n".join(part for part in body if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def fact(label: str, value: str, detail: str = "") -> str:
    """A labelled value, for a `<dl>`; `value` is HTML."""
    small = f'<dd class="detail">{text(detail)}</dd>' if detail else ""
    return f'<div><dt>{text(label)}</dt><dd class="value">{value}</dd>{small}</div>'


def note(value: str) -> str:
    """A remark; empty without text."""
    return f'<p class="note">{text(value)}</p>' if value else ""


def folded(title: str, body: str) -> str:
    """What is shown when asked for."""
    return f"<details>\n<summary>{text(title)}</summary>\n<div>{body}</div>\n</details>"


def table(
    head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], kind: str, caption: str = ""
) -> str:
    """A table.

    Args:
      head: HTML of the cells of the head; none: no head.
      rows: HTML of the row's heading and of its cells.
      kind: Class of the table.
      caption: Text above it.
    """
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, cells in rows
    )
    above = f"<caption>{text(caption)}</caption>" if caption else ""
    thead = f"<thead><tr>{titles}</tr></thead>\n" if head else ""
    return f'<table class="{kind}">{above}\n{thead}<tbody>\n{lines}\n</tbody></table>'


def scrolling(content: str, label: str) -> str:
    """A box that scrolls where the screen is too narrow for what is in it."""
    # Without a tab stop the keyboard could not scroll it.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{content}</div>'
    )


def swatch(colour: int, label: str, shape: str = "line") -> str:
    """A label with its colour of the palette before it; shape: line, dot, box or mark."""
    number, dash = colour % 8, ("solid", "dashed", "dotted")[max(colour, 0) // 8 % 3]
    shown = "var(--dim)" if colour < 0 else f"var(--c{number})"
    style = f"color: {shown}" + (f"; border-top-style: {dash}" if dash != "solid" else "")
    return f'<span class="swatch"><span class="{shape}" style="{style}"></span>{text(label)}</span>'


def key(swatches: Iterable[str]) -> str:
    """What the colours of a chart stand for."""
    items = "".join(f"<li>{item}</li>" for item in swatches)
    return f'<ul class="key">{items}</ul>' if items else ""
