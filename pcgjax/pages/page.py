"""How a page of figures and tables is made: HTML in one file, without a script or an outside request.

Figures are inline SVG whose colours are the page's own CSS variables, so that they follow the reader's light or dark
theme. What these functions return is HTML; text that they are given is escaped unless they say otherwise.
"""

from __future__ import annotations

import html
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pcgjax.metrics import finite

# The light theme's colours stand in the SVG for the CSS variables of the same name.
COLOURS = {
    "ink": "#1b2430", "muted": "#667085", "line": "#e3e7ee", "blue": "#2f6bdb", "orange": "#d9650b",
    "teal": "#0f8f7e", "purple": "#8052cc", "pink": "#c93a78", "olive": "#86800f",
}  # fmt: skip
INK, MUTED, LINE, BLUE, ORANGE, TEAL, PURPLE, PINK, OLIVE = COLOURS.values()
SERIES = (BLUE, ORANGE, TEAL, PURPLE, PINK, OLIVE)


def escape(value: Any) -> str:
    return html.escape("n/a" if value is None else str(value), quote=True)


def number(value: Any, digits: int = 3) -> str:
    """As text for a page or a figure: counts whole with thousands apart, else `digits` decimals."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    found = finite(value)
    return "n/a" if found is None else f"{found:.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def score(value: Any) -> str:
    """The number of a score, and its interval where it has one."""
    between = interval(finite(value, "low"), finite(value, "high"))
    return number(finite(value)) + (f"<small>{between}</small>" if between else "")


def share(value: Any) -> str:
    """A share from 0 to 1 as a bar and in percent."""
    found = finite(value)
    if found is None:
        return "n/a"
    return f'<span class="meter" style="--share:{100 * found:.0f}%"></span>{found:.0%}'


def count(number: int | None, one: str, many: str = "") -> str:
    """Such as "1 person" or "2,000 people"; nothing where there is no number."""
    return "" if number is None else f"{number:,} {one if number == 1 else many or one + 's'}"


def absent(sentence: str) -> str:
    return f'<p class="absent">{escape(sentence)}</p>'


def card(title: str, inside: str, caption: str) -> str:
    """A figure; `inside` and `caption` are HTML already."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<figure class="card">{head}{inside}<figcaption>{caption}</figcaption></figure>'


def gauge(value: float | None, low: float | None, high: float | None, trivial: float | None) -> str:
    """A ruler from 0 to 1 with the interval, the value and a tick for the trivial answer."""
    if value is None or not 0 <= value <= 1:
        return ""
    parts = ['<line x1="0" y1="7" x2="200" y2="7" stroke="var(--line)" stroke-width="4" stroke-linecap="round"/>']
    if low is not None and high is not None:
        parts.append(
            f'<line x1="{low * 200:.1f}" y1="7" x2="{high * 200:.1f}" y2="7" stroke="var(--blue)" '
            'stroke-opacity="0.45" stroke-width="4" stroke-linecap="round"/>'
        )
    if trivial is not None:
        x = f"{trivial * 200:.1f}"
        parts.append(f'<line x1="{x}" y1="0" x2="{x}" y2="14" stroke="var(--orange)" stroke-width="2"/>')
    parts.append(f'<circle cx="{value * 200:.1f}" cy="7" r="5" fill="var(--blue)"/>')
    return f'<svg class="gauge" viewBox="-6 0 212 14" aria-hidden="true">{"".join(parts)}</svg>'


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """`body` is HTML already, `head` is text."""
    columns = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in body
    )
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Nested values as a list of names and texts."""

    def flat(value: Any, name: str) -> Iterable[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list):
            shown = ", ".join(json.dumps(v) if isinstance(v, dict | list) else str(v) for v in value[:12])
            yield name, shown + (f", … ({len(value)})" if len(value) > 12 else "")
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        else:
            yield name, "n/a" if value is None else str(value)

    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in flat(values, ""))
    return f"<dl>{''.join(items)}</dl>"


def svg(width: int, height: int, alt: str, paint: Callable[[Any], None], free: bool = False) -> str:
    """What `paint(figure)` draws as inline SVG, `width` x `height` units of about a CSS pixel.

    Colours of `COLOURS` become CSS variables, text stays text, ids are made the figure's own, and nothing in it
    refers outside. `free`: paint places the axes itself.
    """
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
    own = f"f{zlib.crc32(alt.encode()):08x}-"
    body = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{own}", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">{body}'
    return f'<div class="wide">{drawn}</div>' if width > 600 else drawn  # on a phone a wide one scrolls


def document(heading: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole page; a section is (id, title, HTML)."""
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = ""
    for name, title, inside in sections:
        body += f'<section id="{name}"><h2>{escape(title)}</h2>{inside}</section>'
    # The policy makes the browser itself refuse anything from outside and any script.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(heading)}</title><style>{_CSS}</style></head>'
        f'<body><header><p class="eyebrow">pcgjax · phonocardiogram models</p><h1>{escape(heading)}</h1>'
        f'<p class="sub">{escape(subtitle)}</p><nav>{links}</nav></header><main>{body}</main></body></html>\n'
    )


_DARK = (
    "--ink:#e6eaf2;--muted:#98a2b5;--line:#2e3746;--blue:#7fa8ff;--orange:#ff9d52;--teal:#4fd0bb;--purple:#bb9bff;"
    "--pink:#ff84b4;--olive:#cfc65c;--page:#10151d;--card:#181f2a;--good:#4fd0bb"
)
_CSS = (
    ":root{color-scheme:light dark;"
    + "".join(f"--{k}:{v};" for k, v in COLOURS.items())
    + "--page:#f5f7fa;--card:#fff;--good:#0b7d6e}@media(prefers-color-scheme:dark){:root{"
    + _DARK
    + "}}"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:44px}
h1{font-size:2.1rem;line-height:1.2;margin:.1em 0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:0 0 .8em;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 .5em}
section{padding:28px 0 12px;scroll-margin-top:8px}
section>h3{margin-top:1.2em}
.eyebrow{margin:0;color:var(--muted);font-size:.82rem;letter-spacing:.04em}
.sub{margin:0 0 1em;color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;padding:10px 0;border-bottom:1px solid var(--line)}
a{color:var(--blue);text-decoration:none;font-size:.92rem}
a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:16px}
.grid{display:grid;gap:16px;margin-bottom:16px}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:0 0 16px;
min-width:0}
.grid .card,.cards .card{margin:0}
.cards+.card{margin-top:16px}
.score h3{color:var(--muted);font-weight:500;font-size:.92rem;margin:0}
.big{font-size:2.15rem;font-weight:650;line-height:1.15;margin:.1em 0 .2em;letter-spacing:-.02em}
.small,figcaption{color:var(--muted);font-size:.86rem;margin:.25em 0 0}
.muted{color:var(--muted)}
.good{color:var(--good);font-weight:600}.warn{color:var(--orange);font-weight:600}
.prose ul{margin:0;padding-left:1.2em}.prose li{margin:.4em 0;max-width:78ch}.prose p{max-width:78ch;margin:.3em 0}
.absent{color:var(--muted);font-style:italic;margin:0 0 16px}
svg{display:block;width:100%;height:auto}
.wide{overflow-x:auto}.wide svg{min-width:640px}
svg *{stroke-linejoin:round}
svg text{font-family:inherit!important}svg image{image-rendering:auto!important}
.gauge{height:14px;max-width:230px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px;margin-bottom:16px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:right;padding:9px 14px;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:500;font-size:.85rem;white-space:normal;vertical-align:bottom}
th:first-child{text-align:left}
tbody th{font-weight:500}
td small,th small{display:block;color:var(--muted);font-size:.8rem;font-weight:400}
.confusion{margin:12px 0 6px;table-layout:fixed;border-collapse:separate;border-spacing:6px}
.confusion th,.confusion td{border:0;white-space:normal;text-align:center;vertical-align:middle}
.confusion thead td{color:var(--muted);font-size:.85rem;text-align:left}
.confusion th[scope=row]{text-align:left;padding-left:4px}
.confusion tbody td{height:150px;border-radius:8px;font-size:.85rem}
.confusion b{display:block;font-size:1.7rem;line-height:1.3}
.confusion span{color:var(--muted)}
.right{background:color-mix(in srgb,var(--teal) calc(6% + var(--share)*.34),transparent)}
.wrong{background:color-mix(in srgb,var(--orange) calc(6% + var(--share)*.34),transparent)}
.meter{display:inline-block;width:90px;height:8px;border-radius:4px;margin-right:10px;vertical-align:middle;
background:linear-gradient(to right,var(--blue) var(--share),var(--line) var(--share))}
dl{margin:0;font-size:.9rem}
dl div{display:flex;gap:12px;justify-content:space-between;border-bottom:1px solid var(--line);padding:5px 0}
dl div:last-child{border:0}
dt{color:var(--muted)}dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
pre{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px;overflow-x:auto;
font:13px/1.5 ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace;margin:0 0 16px}
summary{cursor:pointer;font-weight:600;margin-bottom:8px}
@media(max-width:600px){header,main{padding-left:14px;padding-right:14px}
.cards{grid-template-columns:1fr 1fr;gap:10px}.card{padding:14px}.big{font-size:1.6rem}}
@media print{nav{display:none}.card,figure{break-inside:avoid}}
"""
)
