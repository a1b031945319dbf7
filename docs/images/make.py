"""Draws the pictures of the documentation: `python docs/images/make.py`.

The colours have enough contrast on a white and on a dark page; there is no background.
"""

from pathlib import Path

BLUE, ORANGE, GREEN, GREY, TEXT = "#3b82f6", "#f97316", "#16a34a", "#9aa3ad", "#7b8794"
HERE = Path(__file__).parent


def rect(x, y, width, height, fill, *, dashed=False):
    style = f'fill="none" stroke="{fill}" stroke-width="1.5" stroke-dasharray="4 3"'
    style = style if dashed else f'fill="{fill}"'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" {style}/>'


def text(x, y, content, *, size=15, color=TEXT, anchor="middle", weight=400):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{content}</text>'
    )


def box(x, y, width, height, fill, *lines, size=14):
    first = y + height / 2 + size * 0.36 - (len(lines) - 1) * size * 0.6
    words = [
        text(x + width / 2, first + i * size * 1.2, line, size=size, color="#ffffff", weight=600)
        for i, line in enumerate(lines)
    ]
    return "".join([rect(x, y, width, height, fill), *words])


def arrow(x1, y1, x2, y2):
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{TEXT}" stroke-width="2" '
        f'marker-end="url(#head)"/>'
    )


def svg(name, width, height, title, *parts):
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{TEXT}"/></marker>'
    )
    content = "\n".join(parts)
    (HERE / f"{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f"<title>{title}</title>\n<defs>{head}</defs>\n{content}\n</svg>\n"
    )


def one_gradient():
    """All gradients at once beside one at a time."""
    parts, layers, size, gap = [], 8, 38, 8
    panels = [(30, "value_and_grad, then update", range(8)), (470, "lomo_jax.fused_step", [4])]
    for left, title, alive in panels:
        width = layers * (size + gap) - gap
        parts.append(text(left + width / 2, 28, title, size=18, weight=600))
        for i in range(layers):
            x = left + i * (size + gap)
            has_gradient = i in alive
            parts.append(
                rect(x, 48, size, size, ORANGE if has_gradient else GREY, dashed=not has_gradient)
            )
            done = len(alive) == 1 and i > alive[0]
            parts.append(rect(x, 48 + size + gap, size, size, GREEN if done else BLUE))
            parts.append(text(x + size / 2, 48 + 2 * size + gap + 18, str(i + 1), size=13))
        caption = (
            "the gradients of all layers exist together"
            if len(alive) > 1
            else "layers 8 to 6 are updated, layer 5 is next"
        )
        parts.append(text(left + width / 2, 182, caption, size=14))
        bar = 200
        parts.append(box(left, bar, width / 2 - 2, 26, BLUE, "weights", size=13))
        share = 1 if len(alive) > 1 else 1 / layers
        parts.append(rect(left + width / 2, bar, width / 2 * share, 26, ORANGE))
        if len(alive) > 1:
            parts.append(
                text(
                    left + width * 0.75, bar + 18, "gradients", size=13, color="#ffffff", weight=600
                )
            )
        else:
            parts.append(
                text(left + width * 0.585, bar + 18, "one gradient", size=13, anchor="start")
            )
    svg("one-gradient", 860, 244, "All gradients at once, and one at a time", *parts)


def how_it_works():
    """Trace and cut, forward, backward, and one layer of the backward pass."""
    parts, columns = [], [("embed", 130, 90)]
    columns += [(f"layer {i + 1}", 250 + 105 * i, 90) for i in range(4)]
    columns.append(("head, loss", 690, 110))
    names = ["1 trace, cut", "2 forward", "3 backward"]
    for y, name in zip((61, 171, 281), names, strict=True):
        parts.append(text(8, y + 25, name, size=15, anchor="start", weight=600))

    parts.append(text(175, 40, "dense segment", size=13))
    parts.append(text(452, 40, "layer scan", size=13))
    parts.append(text(745, 40, "dense segment", size=13))
    parts.append(rect(240, 50, 425, 62, GREY, dashed=True))
    for k, (label, x, width) in enumerate(columns):
        is_layer = 0 < k < 5
        parts.append(box(x, 61, width, 40, BLUE, label))
        parts.append(box(x, 171, width, 40, BLUE, label))
        color = GREEN if k > 3 else ORANGE if k == 3 else BLUE
        parts.append(box(x, 281, width, 40, color, label))
        if k:
            start = columns[k - 1][1] + columns[k - 1][2]
            parts.append(arrow(start + 2, 191, x - 2, 191))
        if k > 3:
            parts.append(arrow(x - 2, 301, start + 2, 301))
        if is_layer:
            parts.append(rect(x - 16, 219, 18, 18, GREY))
    parts.append(text(452, 256, "saved: the input of each layer", size=13))
    parts.append(text(745, 342, "updated", size=13))
    parts.append(text(610, 342, "updated", size=13))
    parts.append(text(505, 342, "now", size=13, color=ORANGE, weight=600))
    parts.append(text(452, 378, "Layer 3 in the backward pass:", size=14, weight=600))
    steps = [
        (BLUE, "read", "layer 3"),
        (GREY, "recompute", "from its input"),
        (ORANGE, "gradient", "of layer 3"),
        (ORANGE, "optax", "update"),
        (GREEN, "write layer 3", "in place"),
    ]
    for k, (color, *lines) in enumerate(steps):
        x = 20 + 164 * k
        parts.append(box(x, 394, 130, 48, color, *lines, size=13))
        if k:
            parts.append(arrow(x - 32, 418, x - 3, 418))
    parts.append(text(413, 468, "then its gradient is gone, and layer 2 is next", size=13))
    svg("how-it-works", 830, 482, "How the fused step works", *parts)


if __name__ == "__main__":
    one_gradient()
    how_it_works()
