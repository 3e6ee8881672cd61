"""Makes docs/performance.md and its picture from bench/results.json, as `run.py` does.

`report.py [DIR]` makes them anew, there or in docs/, after a change of their words. The page has no
figure of its own, so that it cannot drift from what was measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

from contenders import OURS, POOL_SIZE
from rounds import Ratio, Row, Rows, ratio
from scenes import CALLS, FEW, MANY, MESSAGES, PAGE, SEARCHERS, Plan
from stage import BENCH, ROOT

RESULTS = BENCH / "results.json"
DOCS = ROOT / "docs"
BUSY_PERCENT = 10
WORDS = {1: "one core", 2: "two cores", 4: "four cores", 8: "eight cores"}


@dataclass
class Made:
    """How the results came about; `busy_percent` is the CPU that other work took at the start."""

    command: str
    plan: Plan
    cpus: int
    generator: str
    busy_percent: float
    made_of: dict[str, str]
    grouped: bool  # whether Linux's automatic task groups are on
    minutes: float = 0
    postgres: list[str] = field(default_factory=list)
    runs: str = "from source"  # or compiled: how Gatehouse ran
    python: str = "Python"  # which one Gatehouse and its peers in Python ran on
    against: str = ""  # which commit the scene of that name compares with, and what it did

    @property
    def cores(self) -> str:
        return WORDS.get(self.cpus, f"{self.cpus} cores")

    @property
    def is_busy(self) -> bool:
        return self.busy_percent > BUSY_PERCENT

    def warning(self) -> str:
        """Why the figures must not be believed; empty where they may."""
        if self.plan.name == "smoke":
            return "this run shows that everything works, and its figures say nothing"
        if self.is_busy:
            return (
                f"other work took {self.busy_percent:.0f} % of the CPU, and not all servers suffer"
                " from that alike, so the ratios are off"
            )
        return ""


@dataclass
class Results:
    """The rows of each scene that was run."""

    made: Made
    scenes: dict[str, dict[str, Rows]]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Results:
        given = json.loads(path.read_text())
        made = Made(**{**given["made"], "plan": Plan(**given["made"]["plan"])})
        scenes = {
            scene: {
                what: {name: Row(**row) for name, row in rows.items()}
                for what, rows in tables.items()
            }
            for scene, tables in given["scenes"].items()
        }
        return Results(made, scenes)

    def rows(self, scene: str, what: str) -> Rows:
        return self.scenes.get(scene, {}).get(what, {})


def rounded(value: Any) -> Any:
    """With four digits of each figure, which is more than any is good for."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def write(path: Path, folder: Path) -> None:
    """Make the page and its picture from a file of results."""
    results = Results.read(path)
    (folder / "performance.md").write_text(page(results))
    (folder / "performance.svg").write_text(picture(results))


# Tables


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it is too."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    return "\n".join([text(lines[0]), "| " + " | ".join(rule) + " |", *map(text, lines[1:])])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(value: Ratio | None) -> str:
    if value is None:
        return "–"
    return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"


def figures(
    rows: Rows, columns: Mapping[str, str], ratios: Mapping[str, str], base: str, first: str = ""
) -> str:
    """Medians of the columns; then, of the figures in `ratios`, the base's over each other's."""
    lines = []
    for name, row in rows.items():
        if row.void:
            cells = [f"void: {row.void}", *[""] * (len(columns) + len(ratios) - 1)]
        else:
            cells = [number(row.median(figure)) for figure in columns]
            same = name == base or base not in rows
            cells += ["" if same else times(ratio(rows[base], row, figure)) for figure in ratios]
        lines.append([name, *cells])
    return table([first, *columns.values(), *ratios.values()], lines)


RATE = {"rate": "a second"}
CPU = {"cpu_us": "CPU µs"}
DATABASE = {"database_us": "PostgreSQL's CPU µs"}
LATENCY = {"p50_ms": "p50 ms", "p99_ms": "p99 ms"}
TO_IT = {"rate": f"a second, {OURS} to it", "cpu_us": f"CPU, {OURS} to it"}


# At a glance


@dataclass(frozen=True)
class Measure:
    """One line of the picture: which figure, and whether less of it is better."""

    name: str
    scene: str
    what: str
    figure: str = "rate"
    less: bool = False

    def lead(self, results: Results, peer: str) -> Ratio | None:
        """How many times as good Gatehouse is; None where that was not measured."""
        rows = results.rows(self.scene, self.what)
        if OURS not in rows or peer not in rows:
            return None
        ours, theirs = rows[OURS], rows[peer]
        return ratio(theirs, ours, self.figure) if self.less else ratio(ours, theirs, self.figure)


MEASURES = [
    *(Measure(call, "calls", call) for call in CALLS[:3]),
    Measure("1 KB proxied", "calls", CALLS[3]),
    Measure("64 MiB proxied", "large", "64 MiB"),
    *(Measure(f"WebSocket messages {what}", "websockets", what) for what in MESSAGES),
    Measure("memory of an idle stream", "idle", "event streams", "kib_each", less=True),
    Measure("memory of an idle tunnel", "idle", "WebSocket tunnels", "kib_each", less=True),
    Measure("start", "start", "start", "start_ms", less=True),
    Measure("memory of one process after a load", "start", "start", "loaded_mib", less=True),
]


NOTHING = Row(void="it was not measured")


def glance(results: Results) -> str:
    """A line for each of the others: in what Gatehouse is ahead of it, and in what behind."""
    lines = []
    for peer in results.made.made_of:
        sides: dict[str, list[str]] = {"ahead in": [], "a draw in": [], "behind in": []}
        for measure in MEASURES:
            lead = measure.lead(results, peer)
            if lead is not None:
                side = "a draw in" if lead.is_draw else "ahead in" if lead.low > 1 else "behind in"
                sides[side].append(measure.name)
        told = [f"{side} {', '.join(names)}" for side, names in sides.items() if names]
        if told:
            lines.append(f"- **{peer}**: {'; '.join(told)}.")
    return "\n".join(lines)


def alone(results: Results) -> str:
    """What only Gatehouse does here, in a line each."""
    plan = results.made.plan
    lines = []
    for kind in ("event streams", "WebSocket tunnels"):
        row = results.rows("idle", kind).get(OURS, NOTHING)
        if not row.void:
            kept = times(ratio(row, row, "rate", "rate_without"))
            lines.append(
                f"{row.median('count'):,.0f} idle {kind} take {number(row.median('kib_each'))} KiB"
                f" each. With them there are {kept} times as many proxied answers a second as"
                " without."
            )
    row = results.rows("import", "import").get("import", NOTHING)
    if not row.void:
        lines.append(
            f"{plan.rows:,} users are imported in {number(plan.rows / row.median('rate'))} s."
        )
    rows = results.rows("search", "search")
    for name in (FEW, MANY):
        if rows and (slower := ratio(rows[name], rows[PAGE], "p50_ms")):
            lines.append(
                f"{name[0].upper()}{name[1:]}, of {plan.users:,} users, takes {times(slower)} times"
                " as long as a page without a search."
            )
    row = results.rows("export", "export").get("CSV", NOTHING)
    if not row.void:
        lines.append(
            f"{number(row.median('rate'))} users a second are exported as CSV, for which memory"
            f" rises by {number(row.median('memory_mib'))} MiB."
        )
    return "\n".join(f"- {line}" for line in lines)


LABEL, CELL, LINE, TOP = 210, 116, 26, 58
OCTAVE, CENTRE = 9, 30  # pixels for a factor of two; where in a cell the line of 1 is
LEAST, MOST = 1 / 8, 32.0


def picture(results: Results) -> str:
    """docs/performance.svg: a column for each of the others, a line for each measure. A bar to the
    right is how many times as good Gatehouse is, one to the left how many times the other is."""
    leads = {
        peer: {measure.name: measure.lead(results, peer) for measure in MEASURES}
        for peer in results.made.made_of
    }
    leads = {peer: each for peer, each in leads.items() if any(each.values())}
    shown = [one for one in MEASURES if any(each[one.name] for each in leads.values())]
    width, height = LABEL + CELL * len(leads) + 8, TOP + LINE * len(shown) + 12
    parts = [
        f'<text x="12" y="20" class="head">{OURS} beside others on {results.made.cores}</text>'
        '<text x="300" y="20"><tspan class="ahead">■</tspan> ahead <tspan class="behind">■</tspan>'
        ' behind <tspan class="draw">■</tspan> a draw. Times as good; a step of a bar is a factor'
        " of two.</text>"
    ]
    for row, measure in enumerate(shown):
        y = TOP + LINE * row
        if row % 2 == 0:
            parts.append(f'<rect x="0" y="{y}" width="{width}" height="{LINE}" class="band"/>')
        parts.append(f'<text x="12" y="{y + 17}">{escape(measure.name)}</text>')
    for column, (peer, each) in enumerate(leads.items()):
        x = LABEL + CELL * column
        one = x + CENTRE
        parts.append(f'<text x="{x}" y="46" class="head">{escape(peer)}</text>')
        parts.append(f'<path d="M{one} {TOP}V{TOP + LINE * len(shown)}" class="one"/>')
        for row, measure in enumerate(shown):
            if lead := each[measure.name]:
                parts.append(bar(lead, one, TOP + LINE * row))
    style = (
        "text { font: 13px sans-serif; fill: #222 } .head { font-weight: bold }"
        " .band { fill: #f3f5f6 } .one { stroke: #9aa4ab } .ahead { fill: #1f7a55 }"
        " .behind { fill: #c2571a } .draw { fill: #9aa4ab } .step { stroke: #fff }"
    )
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>How many times as good {OURS} is as other servers on {results.made.cores}</title>
<style>{style}</style>
<rect width="100%" height="100%" fill="#fff"/>
{body}
</svg>
"""


def bar(lead: Ratio, one: float, y: int) -> str:
    """The bar of a ratio from the line of 1, with a gap at each factor of two, and its figure."""
    kind = "draw" if lead.is_draw else "ahead" if lead.low > 1 else "behind"
    octaves = math.log2(min(max(lead.median, LEAST), MOST))
    left, right = sorted((one, one + octaves * OCTAVE))
    steps = "".join(
        f"M{one + math.copysign(step * OCTAVE, octaves):.1f} {y + 5}v16"
        for step in range(1, math.ceil(abs(octaves)))
    )
    digits = 0 if lead.median >= 20 else 1 if lead.median >= 2 else 2
    return (
        f'<rect x="{left:.1f}" y="{y + 5}" width="{max(right - left, 1):.1f}" height="16"'
        f' class="{kind}"/><path d="{steps}" class="step"/>'
        f'<text x="{max(right, one) + 5:.1f}" y="{y + 17}" class="{kind}">{lead.median:.{digits}f}×</text>'
    )


# The page


def wrapped(text: str) -> str:
    """Markdown with its paragraphs filled to 100 columns; headings, lists, tables stay."""
    parts = [part.strip("\n") for part in text.split("\n\n")]
    return (
        "\n\n".join(
            part if part[0] in "#-|!" else fill(part, 100, break_on_hyphens=False)
            for part in parts
            if part
        )
        + "\n"
    )


def page(results: Results) -> str:
    """docs/performance.md: what was measured, without the scenes that were not run."""
    made = results.made
    warning = f"\n\n**Do not use these figures: {made.warning()}.**" if made.warning() else ""
    sections = [section(results) for section in SECTIONS]
    return wrapped(f"""# Performance

Made by `{made.command}` on {made.cores} in {made.minutes:.0f} min. Measure on a machine of your
own: `make bench` takes about 8 minutes, `make bench-full` about 25. Look at the ratios: the figures
of your machine will be others.{warning}

![In what Gatehouse is ahead of other servers, and in what behind](performance.svg)

{listed("Gatehouse beside each:", glance(results))}

{listed("Gatehouse by itself:", alone(results))}

{compared(made)}

{"".join(text for text in sections if text)}""")


def listed(title: str, items: str) -> str:
    return f"{title}\n\n{items}" if items else ""


def compared(made: Made) -> str:
    plan = made.plan
    made_of = "\n".join(f"- **{name}**: {text}." for name, text in made.made_of.items())
    return f"""## What is compared

{made.cores.capitalize()} run everything at once: the server that is measured, PostgreSQL
{" and ".join(made.postgres)}, the upstream and the load generator ({made.generator}). So the
requests a second are lower than the same server would reach with the machine to itself, and they do
not tell what your machine would reach. The servers take turns in {plan.rounds} rounds of {plan.seconds} s
each, beginning with another server each time. Figures are medians of the rounds. A ratio is that of
one round; its median is given, then the lowest and the highest in brackets. A ratio whose range spans 1 is a
draw. One failed request voids a row, and so does a generator that was busy for nine tenths of the
time. Linux's automatic task groups are {"on" if made.grouped else "off"}:
[production](production.md#2-the-database-3-minutes) says what they do.

The embedded PostgreSQL has no pg_trgm. So search, export and tables of several sizes use the
system's, where there is one; all else uses the embedded one.

Unless said otherwise, each server has {made.cpus} processes, and {POOL_SIZE} database connections in
each. Gatehouse and nginx write their access logs, as they do by default, to a file; the others
write none. Gatehouse runs {made.runs}, on {made.python}, with `WORKERS={made.cpus}`, and all else
as it is by default.

{made_of}

The peers do the same four calls on the same table, check what they are given, and stream what they
proxy. They do not do the rest of what Gatehouse does (entity tags, metadata, problem documents,
forwarding headers, request ids, deadlines), so they have less work. nginx and Caddy only proxy. A
commit does not wait for the disk, and nothing is vacuumed meanwhile, for any of them.

"CPU µs" is the server's own time for each request, message, MiB or user, in all its processes.
PostgreSQL's stands beside it, since work can be moved there, and Gatehouse has PostgreSQL make the
JSON. Latencies are those of 64 connections that always have a request under way: under such a load
they say who is saturated, not how long a lone request takes.

"""


def four_calls(results: Results) -> str:
    if "calls" not in results.scenes:
        return ""
    parts = []
    for call in CALLS:
        database = {} if call == CALLS[3] else DATABASE
        rows = figures(results.rows("calls", call), RATE | CPU | database | LATENCY, TO_IT, OURS)
        parts.append(f"### {call[0].upper()}{call[1:]}\n\n{rows}\n\n")
    memory = figures(results.rows("calls", "memory"), {"memory_mib": "MiB"}, {}, OURS)
    parts.append(f"Memory of all processes after these (proportional set size):\n\n{memory}\n\n")
    return "## Four calls\n\n" + "".join(parts)


def large(results: Results) -> str:
    if not (rows := results.rows("large", "64 MiB")):
        return ""
    columns = {"rate": "MiB/s", "cpu_us": "CPU µs a MiB"}
    ratios = {"rate": f"MiB/s, {OURS} to it", "cpu_us": f"CPU, {OURS} to it"}
    text = figures(rows, columns, ratios, OURS)
    return f"## 64 MiB through the proxy\n\nFour at a time.\n\n{text}\n\n"


def websockets(results: Results) -> str:
    if "websockets" not in results.scenes:
        return ""
    parts = [
        "## WebSocket messages\n\nMessages that the upstream sends back, one under way on each of"
        " 64 connections. The generator, the upstream and the proxy share the cores, so that the"
        " messages a second hide a part of the difference, and the CPU time shows all of it. The"
        " last row has no proxy at all: it is the limit here.\n\n"
    ]
    for what in MESSAGES:
        rows = figures(results.rows("websockets", what), RATE | CPU | LATENCY, TO_IT, OURS)
        parts.append(f"Messages {what}:\n\n{rows}\n\n")
    return "".join(parts)


def idle(results: Results) -> str:
    if "idle" not in results.scenes:
        return ""
    parts = [
        "## Idle streams and tunnels\n\nProxied answers of 1 KB while as many connections are open"
        " as descriptors allow, and without them. A connection's memory is what the server's"
        " processes have grown by; the kernel's buffers are not in it.\n\n"
    ]
    columns = {
        "count": "open",
        "kib_each": "KiB each",
        "threads": "threads with them",
        "rate": "answers/s with them",
        "rate_without": "answers/s without",
        "p99_ms": "p99 ms with them",
        "p99_ms_without": "p99 ms without",
    }
    for kind in ("event streams", "WebSocket tunnels"):
        rows = results.rows("idle", kind)
        kept = [
            f"{name} {times(ratio(row, row, 'rate', 'rate_without'))}"
            for name, row in rows.items()
            if not row.void
        ]
        parts.append(
            f"Idle {kind}:\n\n{figures(rows, columns, {}, OURS)}\n\n"
            f"Answers a second with them, divided by those without: {'; '.join(kept)}.\n\n"
        )
    return "".join(parts)


def start(results: Results) -> str:
    if not (rows := results.rows("start", "start")):
        return ""
    columns = {
        "start_ms": "start to first proxied answer, ms",
        "first_mib": "memory after it, MiB",
        "loaded_mib": "memory after a load, MiB",
    }
    ratios = {
        "start_ms": f"start, {OURS} to it",
        "loaded_mib": f"memory after a load, {OURS} to it",
    }
    return (
        "## Start and memory\n\nOne process of each; Caddy's has threads for all cores. The row"
        " *bare* is a program with nothing but bottle, requests and waitress that can only proxy a"
        " GET (`bench/peers/bare`). It shows what Gatehouse could still save. Memory is the proportional set"
        f" size.\n\n{figures(rows, columns, ratios, OURS)}\n\n"
    )


def imports(results: Results) -> str:
    if not (rows := results.rows("import", "import")):
        return ""
    text = figures(rows, RATE | CPU | DATABASE, {}, OURS)
    quicker = ratio(rows["import"], rows["creates"], "rate")
    seconds = ""
    if not rows["import"].void:
        whole = results.made.plan.rows / rows["import"].median("rate")
        risen = rows["import"].median("memory_mib")
        seconds = (
            f" The import takes {number(whole)} s: {times(quicker)} times as many users a second as"
            f" with a create for each. Gatehouse's memory rises by {number(risen)} MiB meanwhile."
        )
    return (
        f"## Import\n\n{results.made.plan.rows:,} new users in one CSV, and creates over 64"
        f" connections.{seconds}\n\n{text}\n\n"
    )


def growth(results: Results) -> str:
    if "growth" not in results.scenes:
        return ""
    parts = ["## As work grows\n\n"]
    for call in (CALLS[0], CALLS[3]):
        rows = results.rows("growth", call)
        text = figures(rows, RATE | CPU | LATENCY, {}, OURS, "connections")
        parts.append(f"{call[0].upper()}{call[1:]}, by connections:\n\n{text}\n\n")
    rows = results.rows("growth", "a page of so many users")
    text = figures(rows, RATE | CPU | DATABASE | LATENCY, {}, OURS, "users")
    parts.append(f"A page of 50, after an id drawn at random, by the size of the table:\n\n{text}")
    return "".join(parts) + "\n\n"


def search(results: Results) -> str:
    if not (rows := results.rows("search", "search")):
        return ""
    columns = RATE | CPU | DATABASE | LATENCY
    slower = "; ".join(
        f"{name} {times(ratio(rows[name], rows[PAGE], 'p50_ms'))}" for name in (FEW, MANY)
    )
    return (
        f"## Search\n\nPages of 50 in a table of {results.made.plan.users:,} users, over"
        f" {SEARCHERS} connections. One search is for a last name that one user has, or few. The other"
        " is for a text that is in each address.\n\n"
        f"{figures(rows, columns, {}, OURS)}\n\n"
        f"Median time, divided by that of a page without a search: {slower}.\n\n"
    )


def export(results: Results) -> str:
    if not (rows := results.rows("export", "export")):
        return ""
    columns = {
        "rate": "users/s",
        **CPU,
        **DATABASE,
        "memory_mib": "memory rises by, MiB",
    }
    return (
        f"## Export\n\nAll {results.made.plan.users:,} users of that table in one answer.\n\n"
        f"{figures(rows, columns, {}, OURS)}\n\n"
    )


def against(results: Results) -> str:
    tables = results.scenes.get("against", {})
    if not tables:
        return ""
    parts = [
        "## Beside an earlier version\n\nThe four calls of Gatehouse as it is now, and as it was at"
        f" {results.made.against or 'an earlier commit'}.\n\n"
    ]
    for call, rows in tables.items():
        database = {} if call == CALLS[3] else DATABASE
        ratios = {
            figure: f"{title}, now to then" for figure, title in (RATE | CPU | database).items()
        }
        text = figures(rows, RATE | CPU | database | LATENCY, ratios, OURS)
        parts.append(f"{call[0].upper()}{call[1:]}:\n\n{text}\n\n")
    return "".join(parts)


SECTIONS = (four_calls, large, websockets, idle, start, imports, growth, search, export, against)


if __name__ == "__main__":
    write(RESULTS, Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
