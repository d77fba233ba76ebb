"""`--autotune`: find the kernels' block sizes for this GPU and keep them where every later run looks."""

from dataclasses import asdict
from typing import Any

from calsmooth import console
from calsmooth.bench.inputs import Inputs
from calsmooth.environment import describe_device
from calsmooth.errors import UsageError
from calsmooth.files import write_json
from calsmooth.loss import tuning


def autotune(inputs: Inputs) -> dict[str, Any]:
    """Search, say what was found, write `tuning.tuned_file()`; the entry of bench.json.

    Raises:
        UsageError: the kernels can't run here.
    """
    E, C, y = inputs.hidden_states, inputs.lm_head_weight, inputs.targets
    reason = tuning.why_not(E, C, y)
    if reason is not None:
        raise UsageError(f"--autotune is for the GPU kernels, which can't run: {reason}")
    choices = list(tuning.candidates(E.device))
    with console.progress("searching block sizes", total=2 * len(choices)) as advance:
        found = tuning.search(E, C, y, tuning.on_device, choices, advance)
    path = write_json(tuning.tuned_file(), tuning.file_content())
    for f in found:
        k = f.configuration
        console.say(
            f"{'loss and gradients' if f.storing else 'loss alone'}: {f.ms:.3g} ms (before: {f.ms_before:.3g} ms) with "
            f"{k.block_n} x {k.block_v} x {k.block_d}, {k.warps} warps, {k.stages} stages, "
            f"{k.programs_per_sm} a multiprocessor; the best of {f.tried}"
        )
    console.say(f"Wrote {path}, which every later run on {describe_device(E.device)} uses")
    return {"file": str(path), "found": [asdict(f) for f in found]}
