"""``report.html``: ``report.md`` as one self-contained page, with a heat map of tokens.

The page is rendered from the Markdown itself, so that the two cannot disagree. It asks nobody for anything: plots are
embedded, and its Content-Security-Policy forbids the rest.

Colours are Paul Tol's (SRON/EPS/TN/09-002): ones that colour-blind people can tell apart, light enough for black text.
"""

import base64
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from cascade_fast.runtime.visible import visible
from cascade_fast.selection import threshold_text

EXIT_COLOURS = 8  # of stages; the ninth has the first one's
CHANGE_EDGES = (-1.0, -0.3, -0.05, 0.05, 0.3, 1.0)  # nats; unchanged is in the middle
BINS = len(CHANGE_EDGES) + 1
# Sections of the Markdown that the page shows otherwise: the map itself for a link to it, and folded.
HEAT_MAP, SETTINGS, MACHINE = "Token heat map", "Settings", "Machine and versions"


def render_page(markdown: str, images: Mapping[str, bytes], heat_map: dict[str, Any] | None, *, score_name: str) -> str:
    """The page.

    Args:
        images: PNG files by the name that ``markdown`` has them under.
        heat_map: content of ``heat_map.json``; None for a run that has none.
        score_name: what a token's score is, in words.
    """
    environment = Environment(
        loader=PackageLoader("cascade_fast.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=markdown.partition("\n")[0].removeprefix("# "),
        sections=_sections(markdown, images),
        names={"heat_map": HEAT_MAP, "folded": (SETTINGS, MACHINE)},
        heat_map=None if heat_map is None else _view(heat_map),
        score_name=score_name,
        exit_colours=EXIT_COLOURS,
    )


def _sections(markdown: str, images: Mapping[str, bytes]) -> list[tuple[str, Markup]]:
    """Title and HTML below it of each section: what stands before the first ``##``, then one for each.

    HTML in the text is text; tables can be scrolled by themselves.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_renderer: Any, tokens: Any, index: int, *_: Any) -> str:
        data = base64.b64encode(images[tokens[index].attrs["src"]]).decode()
        alt = Markup.escape(tokens[index].content)
        return f'<img src="data:image/png;base64,{data}" alt="{alt}">'

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    starts = [n for n, token in enumerate(tokens) if (token.type, token.tag) == ("heading_open", "h2")]

    def html(first: int, last: int | None) -> Markup:
        return Markup(parser.renderer.render(tokens[first:last], parser.options, {}))

    sections = [("", html(0, starts[0] if starts else None))]
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        sections.append((tokens[start + 1].content, html(start + 3, end)))  # heading: open, text, close
    return sections


def _view(heat_map: dict[str, Any]) -> dict[str, Any]:
    """What the template shows: every token with its classes (``e`` exit, ``s`` score, ``c`` change) and its card. A
    token without a label, whose numbers are None, has neither: it is shown as context."""
    blocks = heat_map["blocks"]
    score_edges = _edges([scores[0] for block in blocks for scores in block["scores"] if scores is not None])
    shown = []
    for block in blocks:
        columns = [block[name] for name in ("texts", "exits", "scores", "base_loss", "loss")]
        tokens = [
            {"text": visible(text), "exit": None}
            if exit_ is None
            else {
                "text": visible(text),
                "classes": f"e{_exit_colour(exit_)} s{bisect_left(score_edges, scores[0])} "
                f"c{bisect_left(CHANGE_EDGES, loss - base)}",
                "exit": exit_,
                "scores": " ".join(f"{score:.4f}" for score in scores),
                "base": f"{base:.4f}",
                "loss": f"{loss:.4f}",
                "change": f"{loss - base:+.4f}",
            }
            for text, exit_, scores, base, loss in zip(columns[0][1:], *columns[1:], strict=True)
        ]
        shown.append({"first": visible(block["texts"][0]), "tokens": tokens})
    counts = Counter(exit_ for block in blocks for exit_ in block["exits"])
    context = counts.pop(None, 0)
    total = sum(counts.values())
    names = ["base", *(f"stage {n}" for n in range(1, len(heat_map["thresholds"]) + 1))]
    return {
        "blocks": shown,
        "blocks_in_all": heat_map["blocks_in_all"],
        "total": total,
        "context": context,
        "thresholds": [threshold_text(threshold) for threshold in heat_map["thresholds"]],
        "legends": {
            "exit": [
                (f"e{_exit_colour(n)}", f"{name} {counts[n] / max(total, 1):.1%}") for n, name in enumerate(names)
            ],
            "score": _legend("s", score_edges, ".2f"),
            "change": _legend("c", CHANGE_EDGES, "+.2f"),
        },
    }


def _exit_colour(exit_: int) -> int:
    """0 for the base; the stages' colours come round again."""
    return exit_ and (exit_ - 1) % EXIT_COLOURS + 1


def _edges(scores: list[float]) -> tuple[float, ...]:
    """Between bins of equal width; the outermost five per cent are in the first and the last."""
    ordered = sorted(scores) or [0.0]
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    return tuple(low + (high - low) * (n + 1) / BINS for n in range(BINS - 1))


def _legend(letter: str, edges: tuple[float, ...], style: str) -> list[tuple[str, str]]:
    at = [format(edge, style).replace("-", "\u2212") for edge in edges]
    texts = [f"\u2264 {at[0]}", *(f"to {edge}" for edge in at[1:]), f"> {at[-1]}"]
    return [(f"{letter}{n}", text) for n, text in enumerate(texts)]
