"""The results as a table to read, a page for the documentation and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill

from contenders import POOL_SIZE, Contender
from load import generator_name
from scenes import Plan, Ratio, Row, Rows, Start, Streams, ratio
from stage import cpus

OURS = "Gatehouse"
WORDS = {1: "one core", 2: "two cores", 4: "four cores", 8: "eight cores"}


@dataclass(frozen=True)
class Results:
    calls: dict[str, Rows]
    large: Rows
    memory: dict[str, int]
    connections: dict[str, Rows]
    sizes: Rows
    streams: Streams
    starts: dict[str, Start]


def cores() -> str:
    return WORDS.get(cpus(), f"{cpus()} cores")


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


def wrapped(text: str) -> str:
    """Markdown with its paragraphs filled to 100 columns; headings, lists, tables stay."""
    parts = text.split("\n\n")
    return (
        "\n\n".join(
            part if part[0] in "#-|!" else fill(part, 100, break_on_hyphens=False) for part in parts
        ).rstrip()
        + "\n"
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mib(value: float) -> str:
    return f"{value / (1 << 20):,.0f}"


def times(value: Ratio | None) -> str:
    if value is None:
        return "–"
    return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"


def ratios(ours: Row, name: str, theirs: Row, figures: Sequence[str]) -> list[str]:
    """Gatehouse over the other in each figure; blank in Gatehouse's own row."""
    if name == OURS:
        return [""] * len(figures)
    return [times(ratio(ours, theirs, figure)) for figure in figures]


def call_table(rows: Rows, with_database: bool) -> str:
    figures = ["rate", "cpu_us", *(["database_us"] if with_database else []), "p50_ms", "p99_ms"]
    heads = [
        "",
        "requests/s",
        "CPU µs",
        *(["PostgreSQL's CPU µs"] if with_database else []),
        "p50 ms",
        "p99 ms",
        f"requests/s, {OURS} to it",
        f"CPU, {OURS} to it",
    ]
    lines = []
    for name, row in rows.items():
        if row.void:
            lines.append([name, f"void: {row.void}", *[""] * (len(heads) - 2)])
            continue
        medians = [number(row.median(figure)) for figure in figures]
        lines.append([name, *medians, *ratios(rows[OURS], name, row, ("rate", "cpu_us"))])
    return table(heads, lines)


def large_table(rows: Rows) -> str:
    lines = []
    for name, row in rows.items():
        if row.void:
            lines.append([name, f"void: {row.void}", "", "", ""])
            continue
        medians = [number(row.median("rate")), number(row.median("cpu_us"))]
        lines.append([name, *medians, *ratios(rows[OURS], name, row, ("rate", "cpu_us"))])
    heads = ["", "MiB/s", "CPU µs a MiB", f"MiB/s, {OURS} to it", f"CPU, {OURS} to it"]
    return table(heads, lines)


def plain_table(what: str, rows: Rows, figures: Sequence[tuple[str, str]]) -> str:
    lines = []
    for name, row in rows.items():
        if row.void:
            lines.append([name, f"void: {row.void}", *[""] * (len(figures) - 1)])
        else:
            lines.append([name, *(number(row.median(figure)) for figure, _ in figures)])
    return table([what, *(title for _, title in figures)], lines)


def memory_table(memory: dict[str, int]) -> str:
    return table(["", "MiB"], [[name, mib(value)] for name, value in memory.items()])


def starts_table(starts: dict[str, Start]) -> str:
    ours, bare = starts[OURS], starts["bare"]
    return table(
        ["", "Gatehouse", "bare", "ratio"],
        [
            [
                "start to first answer, ms",
                f"{ours.seconds * 1000:.0f}",
                f"{bare.seconds * 1000:.0f}",
                f"{ours.seconds / bare.seconds:.2f}",
            ],
            [
                "memory after it, MiB",
                mib(ours.memory_first),
                mib(bare.memory_first),
                f"{ours.memory_first / bare.memory_first:.2f}",
            ],
            [
                "memory after a load, MiB",
                mib(ours.memory_loaded),
                mib(bare.memory_loaded),
                f"{ours.memory_loaded / bare.memory_loaded:.2f}",
            ],
        ],
    )


def growth(results: Results) -> str:
    latency = [
        ("rate", "requests/s"),
        ("cpu_us", "CPU µs"),
        ("p50_ms", "p50 ms"),
        ("p99_ms", "p99 ms"),
    ]
    pages = [*latency[:2], ("database_us", "PostgreSQL's CPU µs"), *latency[2:]]
    streams = results.streams
    kept = ratio(streams.rows["with"], streams.rows["without"], "rate")
    each = (streams.memory_with - streams.memory_before) / streams.count / 1024
    worker = results.memory[OURS] / streams.workers
    parts = [
        f"{call[0].upper()}{call[1:]}, by connections:\n\n{plain_table('connections', rows, latency)}"
        for call, rows in results.connections.items()
    ]
    parts += [
        "A page of 50, after an id drawn at random, by the size of the table:\n\n"
        + plain_table("users", results.sizes, pages),
        f"Users by id while {streams.count:,} idle event streams are open through the proxy:\n\n"
        + plain_table("streams", streams.rows, latency),
        f"With the streams open, {times(kept)} times the requests a second of without. A stream"
        f" takes {each:.1f} KiB; the workers had {streams.threads_before} threads before and"
        f" {streams.threads_with} with them. A worker, after the load of the four calls, has"
        f" {mib(worker)} MiB.",
    ]
    return "\n\n".join(parts)


def page(
    results: Results, peers: Sequence[Contender], plan: Plan, command: str, peer_logs: bool
) -> str:
    """docs/performance.md."""
    made_of = "\n".join(f"- **{peer.name}**: {peer.made_of}." for peer in peers)
    logs = "Gatehouse writes its access log, as it does by default, to a file; " + (
        "so do the others." if peer_logs else "the others write none."
    )
    calls = "\n\n".join(
        f"### {call[0].upper()}{call[1:]}\n\n{call_table(rows, 'proxied' not in call)}"
        for call, rows in results.calls.items()
    )
    return wrapped(f"""# Performance

Made by `{command}`. Run it on a machine of your own: the ratios are what to look at, and they will
differ.

![Requests a second of Gatehouse and of what else a team might run](performance.svg)

## What is compared

{cores().capitalize()} run everything at once: the server that is measured, PostgreSQL, the upstream
and the load generator ({generator_name()}). So the requests a second are lower than the same server
would reach with the machine to itself, and none says what your machine does. Everything takes turns
in {plan.rounds} rounds of {plan.seconds} s each, beginning with another server each time; figures are
medians of the rounds, a ratio is that of one round, and its median stands before the lowest and
the highest. A ratio whose range spans 1 is a draw. One failed request voids a row.

Each has {cpus()} processes and {POOL_SIZE} database connections in each. {logs} Gatehouse runs with
`WORKERS=auto`, and all else as it is by default.

{made_of}

The peers do the same four calls on the same table, check what they are given, and stream what they
proxy. They do not do the rest of what Gatehouse does (entity tags, problem documents, forwarding
headers, request ids, deadlines), so they have less work. A commit does not wait for the disk, and
nothing is vacuumed meanwhile, for any of them. "CPU µs" is the server's own time a request, in all its processes; PostgreSQL's stands
beside it, since work can be moved there, and Gatehouse has PostgreSQL make the JSON. Latencies are
those of 64 connections that always have a request under way: under such a load they say who is
saturated, not how long a lone request takes.

## Four calls

{calls}

## 64 MiB through the proxy

Four at a time.

{large_table(results.large)}

## Start and memory

One process of Gatehouse beside one that has nothing but bottle, requests and waitress, and answers
`/health/live` and a proxied GET (`bench/peers/bare`). Memory is the proportional set size.

{starts_table(results.starts)}

Memory of all processes after the load of the four calls:

{memory_table(results.memory)}

## As work grows

{growth(results)}
""")


WIDTH, LABEL, BAR, STEP, GAP = 760, 110, 18, 24, 34


def plot(results: Results) -> str:
    """docs/performance.svg: bars of requests a second, each panel to its own scale."""
    panels = [(f"{call}, requests/s", rows) for call, rows in results.calls.items()]
    panels.append(("64 MiB through the proxy, MiB/s", results.large))
    parts = []
    y = 20
    for title, rows in panels:
        rates = {name: 0 if row.void else row.median("rate") for name, row in rows.items()}
        # Where it proxies small answers the limit would make all else look the same.
        to_scale = {
            name: rate
            for name, rate in rates.items()
            if "1 KB" not in title or not name.startswith("nginx")
        }
        top = max([*to_scale.values(), 1.0])
        parts.append(f'<text x="16" y="{y}" class="title">{escape(title)}</text>')
        y += 10
        for name, rate in rates.items():
            room = WIDTH - LABEL - 110
            length = to_scale.get(name, 0) / top * room
            value = f"{rate:,.0f}" if rate else "void"
            if name not in to_scale:
                value += ", the limit, not to this scale"
            kind = "ours" if name == OURS else "theirs"
            parts += [
                f'<text x="{LABEL - 8}" y="{y + 14}" class="name">{escape(name)}</text>',
                f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" class="{kind}"/>',
                f'<text x="{LABEL + length + 6:.1f}" y="{y + 14}">{value}</text>',
            ]
            y += STEP
        y += GAP - 10
    style = (
        "text { font: 13px sans-serif; fill: #222 } .title { font-weight: bold }"
        " .name { text-anchor: end } .ours { fill: #1f6f54 } .theirs { fill: #b9c2c9 }"
    )
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 10}" role="img">
<title>Gatehouse beside other servers on {cores()}</title>
<style>{style}</style>
<rect width="100%" height="100%" fill="#fff"/>
{body}
</svg>
"""
