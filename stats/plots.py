"""Figures as SVG text: lines with bands, bars with errors, scatter plots with labels.

    svg = lines({"crowd": (n, rate, low, high), "one judge": (n, rate)}, "Best-of-n", "n", "win rate in %", log_x=True)
    svg = bars({"dpo": (62.4, 1.7), "sft": (48.3, 1.7)}, "Win rates", "win rate in %", references={"draw": 50})
    svg = scatter({"dpo": (62.4, 60.1, 1.7, 1.6)}, "Rankings", "simulated", "people", references={"equal": (r, r)})
    Path("rates.svg").write_text(svg, encoding="utf-8")

A figure stands alone as a file and fits into a page: it scales with its place and follows light and dark. An `error` is
None, a number (as long on both sides), or (low, high), the ends of an interval. `references` are dashed: {label: value
(level in lines and scatter, upright in bars), or (x, y) of a line of its own}. Numbers that are not finite are left
out; a line has a gap there. `width` and `height` are in pixels; text has 13 of them.
"""
import re
from html import escape
from itertools import pairwise
from math import ceil, floor, inf, isfinite, log10
from unicodedata import east_asian_width

import numpy as np

# Okabe and Ito's colours for light and dark pages, some of them darker than theirs, to be seen on white.
COLORS = (("#0072b2", "#56b4e9"), ("#d55e00", "#ff9148"), ("#008f68", "#3cc79c"), ("#b65d91", "#e6a3cb"),
          ("#a67400", "#e9b949"), ("#4f5560", "#c3c8d0"))
SHADES = {"--ink": ("#1d1f22", "#e8e8e6"), "--faint": ("#63676e", "#a2a6ad"), "--rule": ("#dcdee2", "#3a3d43"),
          **{f"--c{k}": pair for k, pair in enumerate(COLORS)}}
LIGHT, DARK = ("".join(f"{name}:{pair[dark]};" for name, pair in SHADES.items()) for dark in (0, 1))
STYLE = (f".plot{{{LIGHT}font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums;max-width:100%}}"
         f"@media screen and (prefers-color-scheme:dark){{.plot{{{DARK}}}}}" """
.plot text{fill:var(--ink)}.plot .faint{fill:var(--faint)}.plot .head{font-weight:600;font-size:14px}
.plot .end{text-anchor:end}.plot .mid{text-anchor:middle}.plot path{fill:none;stroke-width:1.8;stroke-linejoin:round}
.plot .rule{stroke:var(--rule);stroke-width:1}.plot .band{stroke:none;opacity:.16}.plot .thin{stroke-width:1.1}
.plot .reference{stroke:var(--faint);stroke-width:1.2;stroke-dasharray:4 4}""")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")              # beside the colours: twelve lines all look different
MARKS = ("M{l} {y}a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z", "M{l} {t}h{d}v{d}h-{d}z",
         "M{x} {t}l{r} {d}h-{d}z", "M{x} {t}l{r} {r}l-{r} {r}l-{r} -{r}z")
FEW = 20                                # points; a line with more has no marks
EM, LINE = 8.1, 17                      # pixels: the width of a character, the height of a line of text
VALID = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")      # no character of XML


# ---- numbers -------------------------------------------------------------------------------------------

def ticks(low, high, most=6):
    """At most `most` round numbers from low to high: their step is 1, 2 or 5 times a power of ten."""
    power = 10. ** floor(log10((high - low) / most))
    for step in (factor * power for factor in (1, 2, 5, 10, 20)):
        whole = range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)
        if len(whole) <= most:
            return [float(f"{i * step:.10g}") for i in whole]


def log_ticks(values, most=7):
    """At most `most` ticks of a logarithmic axis: the values themselves if they are few, else powers of two or ten, or
    round numbers on an axis that is shorter than a power of ten."""
    own = sorted(set(values))
    if len(own) > most and own[-1] < 10 * own[0]:
        return ticks(own[0], own[-1], most)
    if len(own) > most:
        base = 2 if own[0] >= 1 else 10
        powers = [float(base) ** i for i in range(-30, 60)]
        own = [power for power in powers if own[0] <= power <= own[-1]] or own
    return own[::ceil(len(own) / most)]


def ends(value, error):
    """(low, high) of a value and its error; twice the value if nobody knows the error."""
    if not finite(error):
        return value, value
    return tuple(error) if np.ndim(error) else (value - error, value + error)


def finite(error):
    """Whether an error is given, and finite."""
    return error is not None and bool(np.isfinite(error).all())


def extent(values, share=.05):
    """(low, high) of all finite numbers in a list of arrays, with some room at both ends; never two equal numbers."""
    values = np.concatenate([np.ravel(np.asarray(x, float)) for x in values] or [[]])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0, 1)
    room = share * (high - low) or abs(high) / 10 or 1
    return float(low - room), float(high + room)


def apart(places, gap, low, high):
    """Places on a line from low to high, moved as little as is needed for `gap` between any two; in the old order."""
    order = np.argsort(places, kind="stable")
    moved = np.clip(np.asarray(places, float)[order], low, high)
    moved = np.maximum.accumulate(moved - gap * np.arange(len(moved))) + gap * np.arange(len(moved))
    back = high - gap * np.arange(len(moved))[::-1]
    out = np.empty(len(moved))
    out[order] = np.minimum(moved, back)
    return out.tolist()


# ---- parts of a figure ---------------------------------------------------------------------------------

def shown(x):
    """A number at an axis: 0.5, −20, 12,000."""
    return f"{x:,.10g}".replace("-", "−")


def xml(text):
    return escape(VALID.sub("\ufffd", str(text)))


def size(text):
    """About how many pixels a text is wide."""
    return EM * sum(2 if east_asian_width(c) in "WF" else 1 for c in text)


def words(x, y, text, kind="", most=28):
    """A text at a place, without its middle if it has more than `most` characters."""
    text = str(text)
    short = text if len(text) <= most else f"{text[:most // 2]}…{text[-(most // 2 - 1):]}"
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{xml(short)}</text>'


def color(k):
    return f"var(--c{k % len(COLORS)})"


def mark(k, x, y, r=3.6):
    """The mark of series k: a disc, a square, a triangle, a diamond."""
    path = MARKS[k % len(MARKS)].format(x=f"{x:.1f}", y=f"{y:.1f}", l=f"{x - r:.1f}", t=f"{y - r:.1f}", r=r, d=2 * r)
    return f'<path d="{path}" style="fill:{color(k)}"/>'


def stroke(points, style="", kind=""):
    """A line through points (x, y), interrupted where one is not finite."""
    path, gap = "", True
    for x, y in points:
        if isfinite(x) and isfinite(y):
            path += f"{'M' if gap else 'L'}{x:.1f} {y:.1f}"
        gap = not (isfinite(x) and isfinite(y))
    return f'<path d="{path}" class="{kind}" style="{style}"/>'


def drawn(parts, title, width, height):
    """The parts as one SVG."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" role="img" aria-label="{xml(title)}"><title>{xml(title)}</title>'
            f"<style>{STYLE}</style>{words(0, 14, title, 'head', 80)}{''.join(parts)}</svg>\n")


class Frame:
    """Where data stand in a figure: a box of pixels, the range of both axes, and the grid with its labels."""

    def __init__(self, box, x_range, y_range, log_x=(), whole=False):
        """log_x: the numbers along a logarithmic x axis; whole: whether x has whole numbers only."""
        self.left, self.top, self.right, self.bottom = box
        self.log_x, self.whole, self.x_range, self.y_range = log_x, whole, x_range, y_range

    def x(self, value):
        low, high, value = (np.log(np.asarray(x, float)) if self.log_x else np.asarray(x, float)
                            for x in (*self.x_range, value))
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value):
        low, high = self.y_range
        return self.bottom - (np.asarray(value, float) - low) / (high - low) * (self.bottom - self.top)

    def across(self):
        """Ticks of the x axis, as many as have room."""
        if self.log_x:
            found = []
            for x in log_ticks(self.log_x):
                if not found or self.fit(found[-1], x):
                    found.append(x)
        else:
            for most in range(10, 1, -1):
                found = ticks(*self.x_range, most)
                if all(self.fit(*neighbours) for neighbours in pairwise(found)):
                    break
        return [x for x in found if x == round(x) or not self.whole]

    def fit(self, one, other):
        """Whether the numbers of two ticks have room beside each other."""
        return self.x(other) - self.x(one) >= (size(shown(one)) + size(shown(other))) / 2 + 4

    def grid(self, x, y):
        """Ticks of both axes with their numbers; the names of the axes, x below, y above."""
        across = self.across()
        parts = [words(0, self.top - 12, y, "faint", 70), words(self.right, self.bottom + 36, x, "faint end", 70)]
        for value in levels(self.y_range, self.bottom - self.top):
            level = float(self.y(value))
            parts += [stroke([(self.left, level), (self.right, level)], kind="rule"),
                      words(self.left - 7, level + 4.5, shown(value), "faint end")]
        for value in across:
            place = float(self.x(value))
            parts += [stroke([(place, self.bottom), (place, self.bottom + 4)], kind="rule"),
                      words(place, self.bottom + 18, shown(value), "faint mid")]
        return parts


def levels(y_range, height):
    """Ticks of a y axis of so many pixels."""
    return ticks(*y_range, max(2, int(height / 28)))


def framed(curves, log_x, width, height, right, y):
    """A Frame around curves [(x, y, ...)], with room for the numbers of the y axis and its name `y`, and with `right`
    pixels beside it."""
    across = np.concatenate([np.asarray(curve[0], float) for curve in curves] or [[]])
    y_range = extent([level for curve in curves for level in curve[1:]])
    x_range = tuple(np.exp(extent([np.log(across)], .02))) if log_x else extent([across], .02)
    top, bottom, whole = 50 if y else 30, height - 44, bool((across == across.round()).all())
    left = 10 + max(size(shown(tick)) for tick in levels(y_range, bottom - top))
    return Frame((left, top, width - right, bottom), x_range, y_range, across.tolist() if log_x else (), whole)


def dashed(references, frame):
    """The references of a frame as dashed lines, and [(label, its height)]."""
    parts, labels = [], []
    for label, place in references.items():
        x, y = place if np.ndim(place) else (frame.x_range, (place, place))
        points = list(zip(frame.x(x).tolist(), frame.y(y).tolist()))
        parts.append(stroke(points, kind="reference"))
        labels.append((label, points[-1][1]))
    return parts, labels


def curves_of(references):
    """The references that have a place in x and y, as curves, so that the axes reach them."""
    return [place if np.ndim(place) else ([], [place]) for place in references.values()]


# ---- figures -------------------------------------------------------------------------------------------

def lines(series, title, x, y, log_x=False, references=None, width=400, height=300):
    """Curves {name: (x, y) or (x, y, low, high)}, arrays (N,), the last two a band. Their names, and those of the
    references, stand at the ends of the lines, unless there is one line alone. x, y: names of the axes."""
    references, named = references or {}, len(series) + len(references or {}) > 1
    names = [*series, *references] if named else []
    right = 30 + max(map(size, (name[:28] for name in names)), default=-8)
    height = max(height, 94 + LINE * len(names))
    frame = framed([*series.values(), *curves_of(references)], log_x, width, height, right, y)
    parts, labels = dashed(references, frame)
    for k, (name, (across, level, *band)) in enumerate(series.items()):
        across, level = frame.x(across), frame.y(level)
        if band:
            low, high = map(frame.y, band)
            around = [*zip(across, low), *zip(across[::-1], high[::-1])]
            parts.append(stroke([each for each in around if np.isfinite(each).all()], f"fill:{color(k)}", "band"))
        parts.append(stroke(zip(across, level), f"stroke:{color(k)};stroke-dasharray:{DASHES[k % len(DASHES)]}"))
        there = np.flatnonzero(np.isfinite(across) & np.isfinite(level))
        parts += [mark(k, across[i], level[i]) for i in there if len(there) <= FEW]
        labels.append((name, level[there[-1]] if len(there) else frame.bottom))
    legend = at_the_ends(labels, series, frame) if named else []
    return drawn([*frame.grid(x, y), *parts, *legend], title, width, height)


def at_the_ends(labels, series, frame):
    """Labels [(name, height where its line ends)] beside a frame, each with a piece of its line, pushed apart."""
    parts, order = [], list(series)
    for (name, _), level in zip(labels, apart([level for _, level in labels], LINE, frame.top, frame.bottom)):
        key, kind = [(frame.right + 6, level), (frame.right + 24, level)], "reference"
        style = ""
        if name in series:
            k, kind = order.index(name), ""
            style = f"stroke:{color(k)};stroke-dasharray:{DASHES[k % len(DASHES)]}"
        parts += [stroke(key, style, kind), words(frame.right + 29, level + 4.5, name)]
    return parts


def bars(values, title, x, references=None, form=".1f", ordered=True, width=400):
    """Level bars {name: (value, error)}, the largest first unless not `ordered`; from zero, with whiskers. Names stand
    at the left, numbers at the right. x: name of the axis; form: how the numbers are written."""
    rows, references, step = list(values.items()), references or {}, 26
    if ordered:
        rows.sort(key=lambda row: -row[1][0] if isfinite(row[1][0]) else inf)
    numbers = [numbered(*row, form=form) for _, row in rows]
    left = 12 + max((size(name[:24]) for name, _ in rows), default=0)
    right = width - 14 - max(map(size, numbers), default=0)
    low, high = extent([[end for _, row in rows for end in ends(*row)], [0, *references.values()]], .03)
    top = 26 + LINE * bool(references)
    frame = Frame((left, top, right, top + step * len(rows)), (low if low < -.04 * high else 0, high), (0, 1))
    across = frame.across()
    parts = [words(right, frame.bottom + 36, x, "faint end", 70)]
    parts += [upright(frame, place, "rule") for place in across]
    parts += [words(frame.x(place), frame.bottom + 18, shown(place), "faint mid") for place in across]
    parts += [upright(frame, place, "reference") for place in references.values()]
    room = max(map(size, references), default=0)
    over = apart([float(frame.x(place)) for place in references.values()], room, left, width - room / 2)
    parts += [words(place, top - 6, label, "faint mid") for label, place in zip(references, over)]
    for n, ((name, row), number) in enumerate(zip(rows, numbers)):
        level = top + step * (n + .5)
        parts += [*bar(frame, level, *row), words(left - 8, level + 4.5, name, "end", 24),
                  words(width, level + 4.5, number, "end")]
    return drawn(parts, title, width, frame.bottom + 44)


def upright(frame, place, kind):
    place = float(frame.x(place))
    return stroke([(place, frame.top), (place, frame.bottom)], kind=kind)


def bar(frame, level, value, error=None):
    """One bar from zero to a value, with its error."""
    start, end, low, high = map(float, frame.x([0, value, *ends(value, error)]))
    if not isfinite(end):
        return []
    body = f'<path d="M{start:.1f} {level - 8:.1f}H{end:.1f}v16H{start:.1f}z" style="fill:{color(0)};opacity:.55"/>'
    return [body, *whisker([(low, level), (high, level)])]


def whisker(points, shade="--ink"):
    """An error: a line between two points with short strokes across its ends; nothing if it has no length."""
    (x, y), (end, other) = points
    if not isfinite(x + y + end + other) or points[0] == points[1]:
        return []
    dx, dy = (0, 3.5) if y == other else (3.5, 0)
    caps = [[(px - dx, py - dy), (px + dx, py + dy)] for px, py in points]
    return [stroke(each, f"stroke:var({shade})", "thin") for each in (points, *caps)]


def numbered(value, error=None, form=".1f"):
    """62.4 ± 1.7, or 62.4 (60.1 to 64.8) for an error that is an interval; "" for what is not finite."""
    if not isfinite(value):
        return ""
    said = format(value, form)
    if finite(error):
        said += f" ({error[0]:{form}} to {error[1]:{form}})" if np.ndim(error) else f" ± {error:{form.strip('+')}}"
    return said.replace("-", "−")


def scatter(points, title, x, y, kinds=None, references=None, width=400, height=400):
    """Points {name: (x, y, error of x, error of y)}, the errors optional, each with its name where it hides nothing.
    kinds {name: kind} gives the points of a kind a mark and a color, which stand above the figure."""
    kinds, references, rows = kinds or {}, references or {}, {}
    for name, row in points.items():
        px, py, ex, ey = (*row, None, None)[:4]
        if isfinite(px) and isfinite(py):
            rows[name] = px, py, ends(px, ex), ends(py, ey)
    right = 30 + max((size(label[:28]) for label in references), default=-8)
    frame = framed([*(row[2:] for row in rows.values()), *curves_of(references)], False, width, height, right,
                   y)
    known = list(dict.fromkeys(kinds.get(name, "") for name in rows))
    legend, lower = keys(known, width) if kinds else ([], 0)
    frame.top += lower
    parts, labels = dashed(references, frame)
    marks, taken = {}, []
    for name, (px, py, x_ends, y_ends) in rows.items():
        (px, *x_ends), (py, *y_ends) = frame.x([px, *x_ends]), frame.y([py, *y_ends])
        parts += whisker([(end, py) for end in x_ends], "--faint") + whisker([(px, end) for end in y_ends], "--faint")
        taken += [(min(x_ends), py - 1, max(x_ends), py + 1), (px - 1, min(y_ends), px + 1, max(y_ends))]
        marks[name] = px, py
        parts.append(mark(known.index(kinds.get(name, "")), px, py, 4.5))
    parts += beside(marks, taken, frame) + at_the_ends(labels, {}, frame)
    return drawn([*frame.grid(x, y), *legend, *parts], title, width, height)


def keys(kinds, width):
    """(a mark and a name for each kind, in rows below the title; how many pixels they take)."""
    parts, place, level = [], 0, 34
    for k, kind in enumerate(kinds):
        wide = 30 + size(kind)
        if place and place + wide > width:
            place, level = 0, level + LINE
        parts += [mark(k, place + 6, level - 4.5, 4.5), words(place + 15, level, kind)]
        place += wide
    return parts, level - 34 + LINE


def overlap(one, other):
    """Area that two boxes (left, top, right, bottom) share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, wide) * max(0, high)


def beside(marks, thin, frame):
    """The names of marks {name: (x, y)}, each at the place where its box overlaps least with the marks, the names
    before it, and the boxes `thin`. A name that is not next to its mark has a line to it."""
    parts, solid = [], [(x - 6, y - 6, x + 6, y + 6) for x, y in marks.values()]
    for name, (x, y) in marks.items():
        name, best = name[:28], None
        for far in (9, 16, 26, 38, 52, 68):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (.8, -.8), (-.8, -.8), (.8, .8), (-.8, .8)):
                px, py, wide = x + far * dx, y + far * dy * 1.2, size(name)
                left = px - (0 if dx > 0 else wide if dx < 0 else wide / 2)
                left = max(0, min(left, frame.right - wide))
                box = left - 2, py - 7, left + wide + 2, py + 7
                cut = (wide + 4) * 14 - overlap(box, (frame.left, frame.top, frame.right, frame.bottom))
                cost = 9 * sum(overlap(box, each) for each in solid) + 2 * sum(overlap(box, each) for each in thin)
                cost += 9 * cut + far
                if best is None or cost < best[0]:
                    best = cost, far, box
        _, far, box = best
        solid.append(box)
        if far > 9:
            end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            parts.append(stroke([(x, y), end], "stroke:var(--faint)", "thin"))
        parts.append(words(box[0] + 2, box[1] + 11.5, name))
    return parts
