"""A copy of a model whose own probabilities are the calibrated ones: its logits are the model's, divided by T.

`calsmooth.folding` says where in a model the temperature goes. The copy is made file by file: only the changed
tensors are rewritten (a norm in float32, so that bfloat16 doesn't round the temperature away), and it gets its name
only after it has been loaded like any model and its logits compared.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calsmooth.environment import versions
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import read_json, whole_folder, write_json
from calsmooth.folding import plan_fold, sample_logits, set_setting
from calsmooth.models import load_model, load_tokenizer, model_folder

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference of the logits that rounding explains, as a share of the largest logit."""
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Baked:
    """changed: the tensors and settings that differ from the model's. difference: the largest of the reloaded copy's
    logits, times T, from the model's, as a share of the largest logit."""

    folder: Path
    temperature: float
    changed: list[str]
    difference: float


def check_letters(model: str, revision: str | None = None) -> None:
    """Does the model answer a letter question by one token, so that a temperature of its logits is one of its answers?

    Where the letters differ in more than their last token, a letter's probability is a product over several tokens,
    each renormalised by itself, and dividing the logits isn't dividing the product's logarithm.

    Raises:
        UsageError: they do; the message says which letter and how it is written.
    """
    tokenizer = load_tokenizer(model, revision)
    written = {letter: list(tokenizer(f"Answer: {letter}")["input_ids"]) for letter in "ABCD"}
    first = written["A"]
    for letter, tokens in written.items():
        if tokens[:-1] != first[:-1]:
            one, other = (f"{x} as {tokenizer.convert_ids_to_tokens(written[x])}" for x in ("A", letter))
            raise UsageError(
                f"--bake: {model}'s tokenizer writes {one} and {other}, which differ in more than the last token, so "
                f"that no change of the logits has the effect of the temperature; leave --bake out"
            )


def bake(
    model: str,
    temperature: float,
    folder: Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: "torch.device | str" = "cpu",
) -> Baked:
    """Write to `folder` (new or empty) a copy of `model` whose logits are divided by `temperature`.

    dtype, device: what the check runs in.

    Raises:
        UsageError, CalsmoothError: the model can't be had; nothing in it can take a temperature, for the reason given;
            or the copy, loaded again, doesn't give the logits it should. Then there is no folder.
    """
    source = model_folder(model, revision)
    original = load_model(model, dtype=dtype, device=device, revision=revision)
    plan = plan_fold(original, temperature)
    expected = sample_logits(original) / temperature
    prefix = original.base_model_prefix
    del original
    with whole_folder(folder) as copy:
        kept = _copy_files(source, copy)
        for name, change in plan.tensors.items():
            _rewrite_tensor(copy, kept, name, prefix, change, model)
        if plan.settings:
            config = read_json(copy / "config.json")
            for place, value in plan.settings.items():
                set_setting(config, place, value)
            write_json(copy / "config.json", config)
        changed = [*plan.tensors, *plan.settings]
        write_json(
            copy / "temperature.json",
            {"model": model, "temperature": temperature, "changed": changed, "versions": versions()},
        )
        found = sample_logits(load_model(str(copy), dtype=dtype, device=device))
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE[dtype]:
            raise CalsmoothError(
                f"--bake: loaded again, the copy's logits differ from {model}'s divided by {temperature:.4g} by "
                f"{difference:.1e} of the largest; it was not kept"
            )
    return Baked(Path(folder), temperature, changed, difference)


# --- files ------------------------------------------------------------------------------------------------------------


def _copy_files(source: Path, copy: Path) -> dict[str, str]:
    """Copy a model's files, but for weights in other formats. Returns where each tensor is: {tensor: file}."""
    if (source / INDEX).is_file():
        where: dict[str, str] = read_json(source / INDEX)["weight_map"]
    elif (source / WEIGHTS).is_file():
        where = dict.fromkeys(_tensor_names(source / WEIGHTS), WEIGHTS)
    else:
        raise CalsmoothError(
            f"--bake: {source} has no {WEIGHTS}; expected weights in the safetensors format, as save_pretrained writes"
        )
    for path in sorted(source.iterdir()):
        unused = path.suffix == ".safetensors" and path.name not in where.values()
        if path.is_file() and not path.name.startswith(".") and path.suffix not in OTHER_WEIGHTS and not unused:
            shutil.copyfile(path, copy / path.name)
    return where


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _rewrite_tensor(
    copy: Path, where: Mapping[str, str], name: str, prefix: str, change: Callable[[Tensor], Tensor], model: str
) -> None:
    """Change one tensor of the copy; its file is written anew."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    # Files may hold the names of the model without its head, or the other way round.
    stored = next((n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in where), None)
    if stored is None:
        raise CalsmoothError(f"--bake: {model}'s files hold no tensor called {name}; save it anew with save_pretrained")
    path = copy / where[stored]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    old = tensors[stored]
    if not old.is_floating_point():
        raise CalsmoothError(f"--bake: {model}'s {stored} is {old.dtype}, quantised; bake the model it was made from")
    new = change(old.double())
    tensors[stored] = new.float() if new.dim() == 1 else new.to(old.dtype)
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)  # which save_file narrows to the owner
