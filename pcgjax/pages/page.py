"""What pages of figures and tables are made of: HTML in one file, without a script or an outside request.

The HTML itself stands in templates/ (Jinja): base.html is every page's frame, pieces.html its pieces, and each page has
a template of its own. Jinja escapes whatever it is given, but for what is HTML already: what the functions here return.

Figures are inline SVG whose colours are the page's own CSS variables, so that they follow the reader's light or dark
theme.
"""

from __future__ import annotations

import functools
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pcgjax.metrics import finite
from pcgjax.pages.words import word_of

if TYPE_CHECKING:
    from markupsafe import Markup as Html

# The light theme's colours stand in the SVG for the CSS variables of the same name.
COLOURS = {
    "ink": "#1b2430", "muted": "#667085", "line": "#e3e7ee", "blue": "#2f6bdb", "orange": "#d9650b",
    "teal": "#0f8f7e", "purple": "#8052cc", "pink": "#c93a78", "olive": "#86800f",
}  # fmt: skip
INK, MUTED, LINE, BLUE, ORANGE, TEAL, PURPLE, PINK, OLIVE = COLOURS.values()
SERIES = (BLUE, ORANGE, TEAL, PURPLE, PINK, OLIVE)


# ------------------------------------------------------------------------------------------------------------ numbers


def number(value: Any, digits: int = 3) -> str:
    """As text for a page or a figure: counts whole with thousands apart, else `digits` decimals."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    value = finite(value)
    return "n/a" if value is None else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def spoken(score: Any) -> str:
    """A score and its interval for a terminal or a sentence, such as "0.812 [0.750, 0.861]"."""
    value, low, high = bounds(score)
    return number(value) + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def bounds(score: Any) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of a score, each None where it is not known."""
    return finite(score), finite(score, "low"), finite(score, "high")


def count(number: int | None, one: str, many: str = "") -> str:
    """Such as "1 person" or "2,000 people"; nothing where there is no number."""
    return "" if number is None else f"{number:,} {one if number == 1 else many or one + 's'}"


def text(value: Any) -> str:
    return "n/a" if value is None else str(value)


def flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """(name, text) of the leaves of nested values, the names joined by dots."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        shown = ", ".join(json.dumps(v) if isinstance(v, dict | list) else str(v) for v in value[:12])
        yield name, shown + (f", … ({len(value)})" if len(value) > 12 else "")
    else:
        yield name, f"{value:.6g}" if isinstance(value, float) else text(value)


def setup_values(results: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What `setup` of templates/pieces.html shows of a metrics.json: the command, facts, and the config as JSON."""
    system = dict(results.get("system") or {})
    command = system.pop("command", None)
    split = {k: v for k, v in (results.get("split") or {}).items() if k != "notes"}
    return {
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "facts_of_run": {"Data": results.get("data"), "Split": split, "System": system},
        "config": None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
    }


# --------------------------------------------------------------------------------------------------------------- HTML


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pcgjax.pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    environment.filters.update(number=number, count=count, flat=flat, word=word_of)
    environment.globals.update(interval=interval, colours=COLOURS)
    return environment


def _piece(name: str, *values: Any) -> Html:
    """What a macro of templates/pieces.html makes of values."""
    return getattr(_environment().get_template("pieces.html").module, name)(*values)


def render(template: str, **values: Any) -> str:
    """A page of templates/, whose base needs `heading` and `subtitle`, as the text of a file."""
    return _environment().get_template(template).render(values)


def join(parts: Iterable[Any]) -> Html:
    """HTML of pieces one after another."""
    import markupsafe

    return markupsafe.Markup("").join(parts)


def absent(sentence: str) -> Html:
    """Says why something is not shown."""
    return _piece("absent", sentence)


def bold(text: Any) -> Html:
    return _piece("bold", text)


def italic(text: Any) -> Html:
    return _piece("italic", text)


def small(text: Any) -> Html:
    """A paragraph in small letters."""
    return _piece("small", text)


def muted(text: Any) -> Html:
    return _piece("muted", text)


def marked(kind: str, text: Any) -> Html:
    """Text in the colour of a kind, "good" or "warn"."""
    return _piece("marked", kind, text)


def noted(text: Any, note: str | Sequence[str], kind: str = "") -> Html:
    """Text with a note in small letters beneath it, of one line or several."""
    return _piece("noted", text, note, kind)


def score(value: Any, strong: bool = False) -> Html:
    """The number of a score, in bold if it is the one to look at, and its interval where it has one."""
    value, low, high = bounds(value)
    return noted(bold(number(value)) if strong else number(value), interval(low, high))


def score_or_count(value: Any) -> Html | str:
    return number(value) if isinstance(value, int) else score(value)


def share(value: Any) -> Html | str:
    """A share from 0 to 1 as a bar and in percent."""
    value = finite(value)
    return "n/a" if value is None else _piece("meter", value)


def card(title: str, inside: Any, caption: Any) -> Html:
    """A figure with its caption."""
    return _piece("card", title, inside, caption)


def gauge(value: float | None, low: float | None, high: float | None, baseline: float | None) -> Html:
    """A ruler from 0 to 1 with the interval, the value and a tick for the baseline; nothing of a value outside."""
    return _piece("gauge", value, low, high, baseline)


def verdict(clear: bool, name: str, value: float | None) -> Html:
    """Whether a score is clearly above a baseline of that name and value."""
    return _piece("verdict", clear, name, value)


def score_card(
    title: str, score: Any, baseline: float | None, notes: Sequence[Any], deviation: float | None = None
) -> Html:
    """A score in large figures with its gauge, its interval and lines of notes."""
    return _piece("score_card", title, *bounds(score), baseline, notes, deviation)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    """The first cell of each row is its heading."""
    return _piece("table", head, rows)


def notes(title: str, sentences: Sequence[str]) -> Html:
    """A card of sentences as a list."""
    return _piece("notes", title, sentences)


def confusion(rows: Sequence[tuple[str, int, Sequence[tuple[str, int, float | None]]]]) -> Html:
    """A confusion matrix of rows (truth, recordings, cells ("right" or "wrong", recordings, share of the row))."""
    return _piece("confusion", rows)


def example_caption(example: Mapping[str, Any], truth: str, called: str, part: str) -> Html:
    """Who was recorded, what is known, what was answered, and which part of the recording is shown."""
    return _piece("example_caption", example, truth, called, part)


def lines(texts: Sequence[str]) -> Html:
    """Texts one beneath the other."""
    return _piece("lines", texts)


def pair(figures: Sequence[Html]) -> Html:
    """Figures two side by side."""
    return _piece("pair", figures)


def run_link(path: Any) -> Html:
    """A link to the page of a run, relative to the page that has it."""
    return _piece("run_link", path)


def narrow(width: int, inside: Html) -> Html:
    """No wider than so many pixels."""
    return _piece("narrow", width, inside)


def paper_card(paper: Mapping[str, Any]) -> Html:
    """What is to be known of a paper's numbers, {"note", "source"}."""
    return _piece("paper_card", paper)


def svg(width: int, height: int, alt: str, paint: Callable[[Any], None], free: bool = False) -> Html:
    """What `paint(figure)` draws as inline SVG, `width` x `height` units of about a CSS pixel.

    Colours of `COLOURS` become CSS variables, text stays text, ids are made the figure's own, and nothing in it
    refers outside. `free`: paint places the axes itself. One wider than 600 scrolls on a narrow screen.
    """
    import markupsafe
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": alt, "text.parse_math": False, "font.size": 11, "text.color": INK,
        "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.titlesize": 12, "axes.titlelocation": "left",
        "axes.titleweight": "bold", "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.8, "xtick.color": LINE,
        "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.facecolor": "none",
        "figure.facecolor": "none", "lines.linewidth": 2, "legend.frameon": False, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the page
        matplotlib.rcParams.update(style)
        figure = Figure((width / 72, height / 72), dpi=144, layout=None if free else "constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        # No metadata: it would hold links and the date.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    prefix = f"f{zlib.crc32(alt.encode()):08x}-"
    body = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return _piece("drawing", width, height, alt, markupsafe.Markup(body))  # matplotlib has escaped its texts
