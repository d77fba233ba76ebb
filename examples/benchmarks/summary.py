"""Prints this folder's tables in Markdown from the measurements beside it: `python summary.py`."""

import csv
import json
from pathlib import Path

HERE = Path(__file__).parent
OURS = ("exact", "lean", "filtered")


def rows_of(folder: str) -> list[dict]:
    """From bench.json, or bench.csv where only that was kept; numbers as numbers."""
    path = HERE / folder / "bench.json"
    if path.exists():
        return json.loads(path.read_text())["rows"]
    with (HERE / folder / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("tokens", "total_ms", "peak_bytes", "beta", "grad_error"):
            row[key] = float(row[key]) if row[key] else None
        row["tokens"] = int(row["tokens"])
        row["error"] = row["error"] or None
    return rows


def beside_peers(rows: list[dict]) -> None:
    """Each shape's times of our modes, and of the best of the others that smooths."""
    print("| shape | tokens | exact | lean | filtered | fastest other that smooths | cut-cross-entropy, beta = 0 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    shapes = dict.fromkeys((row["preset"], row["tokens"]) for row in rows)
    for preset, tokens in shapes:
        here = [r for r in rows if (r["preset"], r["tokens"]) == (preset, tokens) and not r["error"]]
        ours = {r["mode"]: cell(r) for r in here if r["method"] == "calsmooth"}
        others = [r for r in here if r["method"] not in ("calsmooth", "roofline") and r["beta"]]
        best = min(others, key=lambda r: r["total_ms"])
        cce = next((cell(r) for r in here if r["label"] == "cut-cross-entropy filtered"), "-")
        cells = [preset, f"{tokens:,}", *(ours[mode] for mode in OURS), f"{best['label']}: {cell(best)}", cce]
        print("| " + " | ".join(cells) + " |")


def cell(row: dict) -> str:
    return f"{row['total_ms']:.3g} ms, {row['peak_bytes'] / 1e9:.2f} GB"


def main() -> None:
    for folder in ("presets", "tokens", "tokens-32768"):
        rows = rows_of(folder)
        if folder == "tokens-32768":
            rows = [row for row in rows if row["tokens"] == 32_768]
        print(f"\n{folder}\n")
        beside_peers(rows)


if __name__ == "__main__":
    main()
