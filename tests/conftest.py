"""Fixtures that several rooms' tests share."""

import os
from pathlib import Path

# Read when torch loads its thread pool; as `calsmooth` itself does: threads that wait don't spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests run side by side, a process a core: more threads in each would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Before anything imports the Hugging Face libraries: no test may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _external(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} isn't set: it names a folder of {what} that is not part of the project")
    if not Path(value).is_dir():
        pytest.skip(f"{variable}={value}: no such folder")
    return Path(value)


@pytest.fixture(scope="session")
def external_data() -> Path:
    """A folder with real data sets (mmlu/, hellaswag/, arc_easy/, alpaca_random_9k/, ...)."""
    return _external("CALSMOOTH_TEST_DATA", "data sets")


@pytest.fixture(scope="session")
def external_models() -> Path:
    """A folder with real small models (smollm2-135m-instruct/, gemma-3-270m/)."""
    return _external("CALSMOOTH_TEST_MODELS", "models")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test leaves tokenised data in the user's cache, or finds some there."""
    os.environ["CALSMOOTH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
