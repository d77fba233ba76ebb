"""On real weights and real questions: what is run once gives what is run in full."""

import pytest

from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.run import run


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_reuse_changes_no_answer(external_data, external_models, tmp_path, dtype, largest):
    settings = {"model": str(external_models / "smollm2-135m-instruct"), "task": ("mmlu",), "device": "cpu"}
    settings |= {"data_dir": external_data, "dtype": dtype, "limit": 8, "shots": 2}
    shared = run(EvaluateConfig(**settings, output=tmp_path / "shared"))
    whole = run(EvaluateConfig(**settings, output=tmp_path / "whole", reuse=False))
    assert "reuse was switched off" in whole.results["notes"][0]
    differences = [
        abs(a - b)
        for one, other in zip(shared.predictions, whole.predictions, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    assert max(differences) < largest
    for one, other in zip(shared.predictions, whole.predictions, strict=True):
        assert one.logprobs.index(max(one.logprobs)) == other.logprobs.index(max(other.logprobs))
