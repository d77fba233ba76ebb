"""A copy of a model whose own probabilities are the calibrated ones: its logits are the model's, divided by T.

Where the temperature goes in, so that it reaches the logits and nothing else (tied embeddings must stay as they are):

1. the weight, and bias, of the norm whose output the head reads; where a norm multiplies by 1 + weight, as Gemma's, the
   weight becomes (1 + weight) / T - 1;
2. where that norm has no weight, the head's own, if it isn't tied to the embeddings;
3. besides, a bias of the head, and a softcap c, which the configuration holds: c tanh(z / c) / T is the same as
   (c / T) tanh((z / T) / (c / T)).

Which of these a model has is seen by running it, not read off names. The copy is made file by file: only the changed
tensors are rewritten (a norm in float32, so that bfloat16 doesn't round the temperature away), and it gets its name
only after it has been loaded like any model and its logits compared.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calsmooth.environment import versions
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import read_json, whole_folder, write_json
from calsmooth.heads import Head, find_head
from calsmooth.models import load_model, load_tokenizer, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@dataclass(frozen=True)
class Plan:
    """New values by parameter name (of the loaded model) and by configuration key."""

    tensors: Mapping[str, Callable[[Tensor], Tensor]]
    settings: Mapping[str, float]


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
    expected = _sample_logits(original) / temperature
    prefix = original.base_model_prefix
    del original
    with whole_folder(folder) as copy:
        kept = _copy_files(source, copy)
        for name, change in plan.tensors.items():
            _rewrite_tensor(copy, kept, name, prefix, change, model)
        if plan.settings:
            config = read_json(copy / "config.json")
            for place, value in plan.settings.items():
                _set(config, place, value)
            write_json(copy / "config.json", config)
        changed = [*plan.tensors, *plan.settings]
        write_json(
            copy / "temperature.json",
            {"model": model, "temperature": temperature, "changed": changed, "versions": versions()},
        )
        found = _sample_logits(load_model(str(copy), dtype=dtype, device=device))
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE[dtype]:
            raise CalsmoothError(
                f"--bake: loaded again, the copy's logits differ from {model}'s divided by {temperature:.4g} by "
                f"{difference:.1e} of the largest; it was not kept"
            )
    return Baked(Path(folder), temperature, changed, difference)


def plan_fold(model: "PreTrainedModel", temperature: float) -> Plan:
    """What to change so that the model's logits are divided by the temperature.

    Raises:
        CalsmoothError: nothing can be changed without changing more than that; the message says why.
    """
    head = find_head(model)
    tensors: dict[str, Callable[[Tensor], Tensor]] = {}

    def divide(parameter: Tensor) -> None:
        tensors[_name_of(model, parameter)] = lambda stored: stored / temperature

    norm = _final_norm(model, head)
    if norm is not None:
        for name, parameter in norm.named_parameters(recurse=False):
            if name == "weight" and _adds_one(norm):
                tensors[_name_of(model, parameter)] = lambda stored: (1 + stored) / temperature - 1
            else:
                divide(parameter)
    elif head.module.weight is model.get_input_embeddings().weight:
        raise CalsmoothError(
            f"--bake: {type(model).__name__} has no weight on the norm before its head, and its head is tied to the "
            f"embeddings, so that no weight divides the logits and nothing else; divide them by {temperature:.4g} when "
            f"sampling instead"
        )
    else:
        divide(head.module.weight)
    if head.module.bias is not None:
        divide(head.module.bias)
    return Plan(tensors, _softcap_settings(model, head, temperature))


def _final_norm(model: "PreTrainedModel", head: Head) -> "nn.Module | None":
    """The module with a weight for each channel whose very output the head reads."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    read: list[Tensor] = []

    def note_output(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    width = head.module.in_features
    hooks = [
        module.register_forward_hook(note_output)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.shape == (width,)
    ]
    hooks.append(head.module.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0])))
    try:
        _sample_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    same = (m for m, output in reversed(outputs) if output.shape == read[-1].shape and torch.equal(output, read[-1]))
    return next(same, None)


def _adds_one(norm: nn.Module) -> bool:
    """Whether a weight of 0 passes the input on, as where a norm multiplies by 1 + weight."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    x = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None, None]
    stored = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        bias = getattr(norm, "bias", None)
        passed = norm(x) if bias is None else norm(x) - bias
        weight.copy_(stored)
    return bool(passed.abs().max() > 0)


def _softcap_settings(model: "PreTrainedModel", head: Head, temperature: float) -> dict[str, float]:
    """The configuration's keys, with dots between levels, that hold the softcap, and their new value."""
    if head.softcap is None:
        return {}
    places = [
        place for place, value in _numbers(model.config.to_dict()) if "cap" in place and _near(value, head.softcap)
    ]
    # The attention's cap may have the same value; the one of the logits says so.
    places = [place for place in places if "logit" in place and "attn" not in place] or places
    if len(places) != 1:
        raise CalsmoothError(
            f"--bake: {type(model).__name__} caps its logits at {head.softcap:g}, and its configuration has no single "
            f"setting of that value to divide by the temperature"
        )
    return {places[0]: head.softcap / temperature}


def _numbers(config: Mapping[str, Any], above: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{above}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((above + key, float(value)))
    return found


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * abs(b)


def _set(config: dict[str, Any], place: str, value: float) -> None:
    *above, key = place.split(".")
    for name in above:
        config = config.setdefault(name, {})
    config[key] = value


def _name_of(model: nn.Module, parameter: Tensor) -> str:
    return next(name for name, candidate in model.named_parameters() if candidate is parameter)


@torch.no_grad()
def _sample_logits(model: "PreTrainedModel") -> Tensor:
    """(2, 16, V) logits, float32, of the same arbitrary tokens each time."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    tokens = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float().cpu()


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
