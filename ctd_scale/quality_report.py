"""What `ctd bench quality` writes: JSON with every row, a table in Markdown and a picture made from it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from ctd_scale.artifacts import write_text
from ctd_scale.batches import SPLITS
from ctd_scale.environment import machine, versions
from ctd_scale.evaluate import METRICS, printed
from ctd_scale.terminal import console

# Rows that may be compared have all of these in common.
PROTOCOL = ("dataset", "splitting", "mask_seen", "users", "items")
PANELS = 3  # of the picture, side by side: more cannot be read on a page
SHOWN = ("hr@10", "ndcg@10", "mrr", "coverage@10")


def require_target(target: Path) -> None:
    """Refuse, before anything is trained for it, a table that could not be written.

    Raises ValueError: no .md, a folder, one that cannot be written to, or JSON beside it that is no table of ours.
    """
    if target.suffix != ".md" or target.is_dir():
        raise ValueError(f"--out {target}: expected a file name that ends in .md; .json and .png go beside it")
    there = next(folder for folder in target.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {target}: {there} cannot be written to; give another --out")
    file = target.with_suffix(".json")
    try:
        rows = json.loads(file.read_text()) if file.exists() else []
        if any(not {*PROTOCOL, "model", "split", "mean", "reference"} <= row.keys() for row in rows):
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"{file} is not the JSON of a table that `ctd bench` wrote, and would be replaced; move it away or give "
            "another --out"
        ) from None


def merged(file: Path, rows: Sequence[dict[str, Any]], command: str) -> list[dict[str, Any]]:
    """Rows of the file with these in the place of those that they replace; each carries where it was measured. How far
    a row that stays is from one that has changed is not known any more."""
    about = {"machine": machine(), "versions": versions(), "command": command}
    old = json.loads(file.read_text()) if file.exists() else []
    new = [{**row, **about} for row in rows]
    replaced, before = (
        {_place(row, row["model"]): [row["mean"].get(name) for name in METRICS] for row in some} for some in (new, old)
    )
    changed = {place for place, mean in replaced.items() if before.get(place) not in (None, mean)}
    kept = [row for row in old if _place(row, row["model"]) not in replaced]
    unknown = {"difference": None, "interval": None}
    return [*(row | unknown if _place(row, row["reference"]) in changed else row for row in kept), *new]


def _place(row: dict[str, Any], model: str) -> tuple[Any, ...]:
    """The row of this model under the protocol of another."""
    return (*(row[key] for key in PROTOCOL), model, row["split"])


def write_quality(rows: Sequence[dict[str, Any]], target: Path, command: str, title: str = "Quality") -> None:
    """`target` (.md) with `.json` and `.png` of the same name beside it. Rows of other sets, protocols or models that
    are already there stay."""
    file = target.with_suffix(".json")
    together = merged(file, rows, command)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(together, indent=1) + "\n")
    picture = target.with_suffix(".png")
    drawn = draw(together, picture)
    write_text(target, markdown(together, picture.name if drawn else "", title))


def markdown(rows: Sequence[dict[str, Any]], picture: str, title: str = "Quality") -> str:
    """One section a set and protocol; test first, then what validation said."""
    lines = [f"# {title}", "", *([f"![NDCG@10 on test]({quote(picture)})", ""] if picture else [])]
    for protocol, chosen in _grouped(rows).items():
        first = chosen[0]
        lines += [
            f"## {protocol}",
            "",
            f"{first['users']:,} test users, {first['items']:,} items, all of them ranked; what is "
            "chosen at all is chosen on validation. ± is the standard deviation over the seeds (by n - 1). The last "
            "column is NDCG@10 minus that of the model it names, with its 95 % interval (paired bootstrap over users).",
            "",
        ]
        for split in reversed(SPLITS):
            heads = ["model", "seeds", *METRICS, "training s", "memory MB", "ranking s", "NDCG@10 minus"]
            lines += [f"{split.capitalize()}:", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
            ordered = _best_first([row for row in chosen if row["split"] == split])
            lines += ["| " + " | ".join(_cells(row)) + " |" for row in ordered]
            lines.append("")
        discrete = [row for row in chosen if row["ids"] and row["split"] == "test"]
        lines += [
            f"- `{row['model']}`: {row['ids']['id_length']} symbols an item, {row['ids']['added_symbols']:,} of them "
            f"new to the vocabulary; without the trie {100 * row['ids']['valid_share']:.0f} % of the beams are items."
            for row in discrete
        ]
        lines += [""] if discrete else []
    commands: dict[str, set[str]] = {}
    for row in rows:
        packages = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        commands.setdefault(f"{row['machine']}; {packages}", set()).add(row["command"])
    for where, made in sorted(commands.items()):
        lines += [f"Measured on {where}, by", "", *(f"- `{command}`" for command in sorted(made)), ""]
    return "\n".join(lines)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The same on the terminal."""
    for title, chosen in _grouped(rows).items():
        for split in SPLITS:
            console.print(f"{title}, [bold]{split}[/]", highlight=False)
            table = Table()
            # What fits on a line; the file has all of it.
            for head in ("model", *SHOWN, "training s", "ndcg@10 minus"):
                table.add_column(head, justify="left" if head == "model" else "right", no_wrap=True)
            for row in chosen:
                if row["split"] == split:
                    values = [f"{row['mean'][name]:.4f}" for name in SHOWN]
                    cells = _cells(row)
                    table.add_row(row["model"], *values, cells[-4], cells[-1])
            console.print(table)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> bool:
    """NDCG@10 on test, one panel a set and protocol, with the spread over seeds; whether that can be done here."""
    try:
        import matplotlib
    except ImportError:
        console.print("no picture: pip install 'ctd-scale[bench]' brings matplotlib", style="yellow", markup=False)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _grouped([row for row in rows if row["split"] == "test"])
    across = min(PANELS, len(groups))
    down = -(-len(groups) // across)
    height = max(4.0, 0.2 * max(map(len, groups.values())))
    figure, panels = pyplot.subplots(down, across, figsize=(4.5 * across, height * down), squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    for panel, (title, chosen) in zip(panels.flat, groups.items(), strict=False):
        ordered = _best_first(chosen)[::-1]
        values = [row["mean"]["ndcg@10"] for row in ordered]
        errors = [row["spread"]["ndcg@10"] for row in ordered]
        panel.barh([row["model"] for row in ordered], values, xerr=errors)
        panel.tick_params(axis="y", labelsize=8)
        panel.set_title(title.replace(", ", "\n"), fontsize=9)
        panel.set_xlabel("NDCG@10, test")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by their protocol, said in words; how many users and items there are where nothing else differs."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in PROTOCOL), []).append(row)

    def title(row: dict[str, Any]) -> str:
        return f"{row['dataset']}, {row['splitting']}, seen items {'masked' if row['mask_seen'] else 'kept'}"

    alike = Counter(title(group[0]) for group in groups.values())
    sizes = {name: "" if count == 1 else ", {users:,} users, {items:,} items" for name, count in alike.items()}
    return {title(group[0]) + sizes[title(group[0])].format(**group[0]): group for group in groups.values()}


def _best_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By NDCG@10; `ablation: model` goes with its model, wherever that comes."""
    own = {row["model"]: float(row["mean"]["ndcg@10"]) for row in rows}

    def place(row: dict[str, Any]) -> tuple[float, str, float]:
        name = row["model"]
        whole = name.rpartition(": ")[2]
        return -own.get(whole, own[name]), whole, -own[name]

    return sorted(rows, key=place)


def _cells(row: dict[str, Any]) -> list[str]:
    several = len(row["seeds"]) > 1
    # Rows of older runs lack what is measured since.
    values = [
        printed(row["mean"].get(name))
        + (f" ± {row['spread'][name]:.4f}" if several and row["spread"].get(name) is not None else "")
        for name in METRICS
    ]
    cost = ["" if row[key] is None else f"{row[key]:,.0f}" for key in ("training_seconds", "peak_memory_mb")]
    shown = ""
    if row["model"] != row["reference"] and row["interval"] is not None:
        low, high = row["interval"]
        shown = f"{row['reference']} {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    seconds = row["mean"]["seconds"]
    return [row["model"], str(len(row["seeds"])), *values, *cost, "" if seconds is None else f"{seconds:.1f}", shown]
