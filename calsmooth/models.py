"""Models and tokenizers: the built-in one, a local folder, or the Hugging Face hub; each failure in one line."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.hub import prepare_hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = "demo"
"""The name of the model that comes with the package (calsmooth.demo)."""


def resolve_model(name: str) -> str:
    """The folder or hub id behind a --model value.

    Raises:
        UsageError: the value looks like a path but no model folder is there.
    """
    if name == BUILT_IN:
        from calsmooth.demo import MODEL_FOLDER

        return str(MODEL_FOLDER)
    path = Path(name).expanduser()
    if path.is_dir():
        # A folder with adapters alone says which model they belong to.
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UsageError(f"--model {name}: the folder has no config.json; expected a Hugging Face model folder")
        return str(path)
    if path.exists():
        raise UsageError(f"--model {name}: is a file; expected a Hugging Face model folder or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "-")):
        raise UsageError(f"--model {name}: no such folder; give an existing folder or a hub id such as org/name")
    return name


def model_label(name: str) -> str:
    """A short name for tables and folders: the last part of a path or hub id.

    A folder that is just called `model`, as in the run folders of `calsmooth finetune`, goes by its run's name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path.resolve()
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):  # a hub id
        return path.name
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def model_description(name: str) -> str:
    """Which model this is, in words: of one that `calsmooth finetune` made, from what, on which data and how.

    That stands in the config.yaml beside the model's folder; without one, it is the name alone.
    """
    path = Path(name).expanduser()
    settings = path.resolve().parent / "config.yaml"
    if name == BUILT_IN:
        return "the built-in model"
    if not path.is_dir() or not settings.is_file():
        return name
    try:
        made = yaml.safe_load(settings.read_text(encoding="utf-8"))
        base, data, beta = made["model"], made["dataset"], float(made["beta"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return name  # some other program's config.yaml
    sources = list(data) if isinstance(data, list) else [data]
    words = ", ".join("the built-in data" if source == BUILT_IN else str(source) for source in sources)
    base = "the built-in model" if base == BUILT_IN else base
    return f"{model_label(name)}: {base} fine-tuned on {words} with label smoothing beta = {beta:g}"


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder with a model's files; those of a hub id are fetched first, where the cache doesn't hold them.

    Raises:
        UsageError, CalsmoothError: they can't be found or fetched.
    """
    source = resolve_model(name)
    if Path(source).is_dir():
        return Path(source)
    prepare_hub()
    from huggingface_hub import snapshot_download

    other_formats = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "onnx/*"]
    try:
        return Path(snapshot_download(source, revision=revision, ignore_patterns=other_formats))
    except (OSError, ValueError) as error:
        raise CalsmoothError(f"--model {name}: its files can't be fetched from the hub ({_brief(error)})") from error


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model; its padding token is set (to the end-of-sequence token where it has none).

    Raises:
        UsageError, CalsmoothError: it can't be found, fetched or read.
    """
    source = resolve_model(name)
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, "tokenizer", name, source, revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str, revision: str | None = None) -> "PreTrainedConfig":
    """A model's configuration, to be changed before `load_model(..., config=...)`.

    Raises:
        UsageError, CalsmoothError: it can't be found, fetched or read.
    """
    source = resolve_model(name)
    from transformers import AutoConfig

    return _load(AutoConfig, "configuration", name, source, revision)


def load_model(
    name: str,
    *,
    dtype: "torch.dtype",
    device: "torch.device | str" = "cpu",
    revision: str | None = None,
    **extra: Any,
) -> "PreTrainedModel":
    """A causal language model in evaluation mode.

    Raises:
        UsageError, CalsmoothError: it can't be found, fetched or read, or isn't a causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = resolve_model(name)
    model = _load(AutoModelForCausalLM, "model", name, source, revision, dtype=dtype, **extra)
    return model.to(device).eval()


def check_vocabulary(name: str, config: "PreTrainedConfig", highest: int) -> None:
    """Refuse tokens that the model has no embedding for, which a GPU would answer with an assertion of its own.

    highest: of the token ids that the model is to read, its padding token's included where it pads. (Of those that its
    tokenizer could give some may lie beyond: Gemma 3's text models have no embedding for a picture.)

    Raises:
        CalsmoothError: tokenizer and weights aren't of one model.
    """
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if size is not None and highest >= size:
        raise CalsmoothError(
            f"--model {name}: its tokenizer gives token {highest} and the model knows {size:,}, from 0 on; take the "
            f"tokenizer that belongs to it, or resize its embeddings if a token was added"
        )


def model_fingerprint(name: str, model: "PreTrainedModel") -> str:
    """What a loaded model is, whatever it is called: its commit on the hub, or the SHA-256 of its folder's files.

    The files that loading reads: weights, configuration, tokenizer, chat template, code.
    """
    source = Path(resolve_model(name))
    if not source.is_dir():
        return f"{name} at {model.config._commit_hash}"
    files = sorted(p for p in source.iterdir() if p.is_file() and p.suffix in _MODEL_SUFFIXES)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256, files))
    whole = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        whole.update(f"{path.name} {digest}\n".encode())
    return f"sha256 {whole.hexdigest()}"


_MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py"}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pick_device(name: str | None = None) -> "torch.device":
    """The device asked for, or the first of cuda, mps, cpu that there is.

    Raises:
        UsageError: the device isn't there.
    """
    import torch

    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; expected cpu, cuda, cuda:1 or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UsageError(f"--device {name}: not available here; leave --device out to use {pick_device()}")
    return device


def pick_dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    """'float32', 'bfloat16' or 'float16' as a torch dtype; by default bfloat16 where the GPU has it, else float32."""
    import torch

    if name is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _load(auto_class: Any, what: str, name: str, source: str, revision: str | None, **arguments: Any) -> Any:
    online = Path(source).is_dir() or prepare_hub()
    try:
        return auto_class.from_pretrained(source, revision=revision, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if Path(source).is_dir():
            raise CalsmoothError(f"--model {name}: the folder's {what} can't be loaded ({_brief(error)})") from error
        why = _brief(error) if online else "the hub can't be reached and the cache doesn't hold it"
        raise CalsmoothError(
            f"--model {name}: no such folder here, and no {what} of that name from the Hugging Face hub: {why}; "
            f"check the name and the network, or give a local folder"
        ) from error


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
