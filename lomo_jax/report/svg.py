"""Makes an SVG file of matplotlib an element of an HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree


def embed(file: str, name: str, label: str, colours: Mapping[str, str]) -> str:
    """Returns the file as an `<svg>` that takes its fonts and colours from the page around it.

    Args:
      file: Its text.
      name: Of the drawing, unique on the page: goes before each id.
      label: What is said of the drawing to those who do not see it.
      colours: What each colour of the file, `#rrggbb`, is on the page.
    """
    root = ElementTree.fromstring(file)
    for parent in list(root.iter()):
        for child in list(parent):
            # The style sheet would be the whole page's.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r"#(\w+)", file))
    for node in root.iter():
        node.tag = _without_namespace(node.tag)
        node.text = node.text if node.tag == "text" else None
        node.tail = None
        node.attrib = {
            _without_namespace(key): _shorten(_recolour(_prefix(key, value, name), colours))
            for key, value in node.attrib.items()
            if key != "id" or value in used
        }
    size = {key: root.attrib[key] for key in ("viewBox",)}
    root.attrib = {**size, "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _without_namespace(name: str) -> str:
    return name.rpartition("}")[2]


def _prefix(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return f"#{name}-{value[1:]}"
    return value.replace("url(#", f"url(#{name}-")


def _recolour(value: str, colours: Mapping[str, str]) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: colours.get(found[0], found[0]), value)


def _shorten(value: str) -> str:
    """Leaves the font's name to the page, and off digits that no screen shows."""
    value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
    return re.sub(
        r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value
    )
