"""`calsmooth bench`."""

from typing import TYPE_CHECKING

from calsmooth import console
from calsmooth.bench.config import BenchConfig
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command

if TYPE_CHECKING:
    from calsmooth.bench.run import Case


@settings_command(app, BenchConfig)
def bench(config: BenchConfig, output: Output) -> None:
    """Time and memory of the loss and its gradients: calsmooth, torch and other projects' kernels, side by side."""
    from rich.text import Text

    from calsmooth.bench.report import describe_statistics, result_table
    from calsmooth.bench.run import by_reason, run

    told: set[str] = set()

    def show(case: "Case") -> None:
        news = {name: reason for name, reason in case.absent.items() if name not in told}
        told.update(case.absent)
        for reason, names in by_reason(news).items():
            console.say(Text(f"not measured: {', '.join(names)}: {reason}"))
        console.say(describe_statistics(case.statistics))
        console.say(result_table(case.rows))
        for row in case.rows:
            if row.note is not None:
                console.say(Text(f"{row.label}: {row.note}"))

    report = run(config, show)
    written = f"Wrote bench.json, bench.csv, bench.md and the figure bench.png (.svg, .pdf) to {report.folder}"
    output.show(written, result=report.to_dict())
