"""`--autotune`: find the kernels' block sizes for this GPU and keep them where every later run looks."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from calsmooth import console
from calsmooth.bench.inputs import Inputs
from calsmooth.environment import describe_device
from calsmooth.errors import UsageError
from calsmooth.files import write_json
from calsmooth.loss import tuning
from calsmooth.loss.kernels.configurations import SHORT


def check(placeholder: Inputs) -> None:
    """Before a search, on a problem of no size with its device and dtype.

    Raises:
        UsageError: the kernels can't run here.
    """
    reason = tuning.why_not(placeholder.hidden_states, placeholder.lm_head_weight, placeholder.targets)
    if reason is not None:
        raise UsageError(f"--autotune is for the GPU kernels, which can't run: {reason}")


def autotune(problems: Iterable[Inputs], count: int, device: torch.device) -> dict[str, Any]:
    """Search over all `count` problems, say what was found, write `tuning.tuned_file()`; the entry of bench.json.

    problems: taken one after the other, so that they can be made when they are needed.
    """
    choices = list(tuning.candidates(device))
    parts = ((p.hidden_states, p.lm_head_weight, p.targets) for p in problems)
    with console.progress("searching block sizes", total=2 * len(choices) * count) as advance:
        found = tuning.search(parts, tuning.on_device, choices, advance)
    for one in found:
        console.say(_words(one))
    path = tuning.tuned_file()
    if any(one.new for one in found):
        write_json(path, tuning.file_content())
        console.say(f"Wrote {path}, which every later run on {describe_device(device)} uses")
    return {"file": str(path), "found": [asdict(one) for one in found]}


def _words(found: tuning.Found) -> str:
    k = found.configuration
    what = "loss and gradients" if found.storing else "loss alone"
    features = f"{'up to' if found.short else 'above'} {SHORT} features"
    sizes = (
        f"{k.block_n} x {k.block_v} x {k.block_d}, {k.warps} warps, {k.stages} stages, "
        f"{k.programs_per_sm} a multiprocessor"
    )
    if not found.new:
        return f"{what}, {features}: nothing faster than {sizes}, which was in use; {found.tried} tried"
    if len(found.ms) == 1:
        gain = f"{found.ms[0]:.3g} ms (before: {found.ms_before[0]:.3g} ms)"
    else:
        shares = [now / before for now, before in zip(found.ms, found.ms_before, strict=True)]
        gain = (
            f"{statistics.geometric_mean(shares):.3f} of the time before over {len(shares)} problems "
            f"({min(shares):.3f} to {max(shares):.3f})"
        )
    return f"{what}, {features}: {gain} with {sizes}; the best of {found.tried}"
