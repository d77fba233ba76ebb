"""Fine-tuning throughput and memory on one GPU: calsmooth beside Trainer with eager loss, with Liger, and TRL.

    pip install 'calsmooth[bench]' && python training_throughput.py     # about eight minutes on an H100
    python training_throughput.py --tiny                                # the same logic on a CPU, in a minute

Randomly initialised models of public shapes; every method trains the same model (bf16 autocast over float32 weights,
fused AdamW, gradients clipped at 1) on the same rows of random tokens, all of one length, of which a share are targets.
The peers run at beta = 0, calsmooth at 0.1. Rounds are interleaved; the first steps of each are left out. Then, for
each method, the largest batch that it can hold. The last norm is scaled so that the logits spread about as a trained
model's do: what `filtered` keeps depends on it.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
warnings.filterwarnings("ignore")

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from calsmooth.data import Example
from calsmooth.finetune.batches import Collator
from calsmooth.finetune.compiled import compiled_layers
from calsmooth.finetune.fit import enable_gradient_checkpointing
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.logits import fold_temperature
from calsmooth.finetune.order import EpochOrder
from calsmooth.finetune.stopping import StopRequest
from calsmooth.finetune.trainer import SFTTrainer

START = time.time()
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LOGIT_SPREAD = 3.5
IGNORED = -100
RESERVED = 2 * 2**30  # of a GPU's memory: CUDA's own, and what fragments take
TINY_MEMORY = 5  # rows, where nothing runs out of memory

SHAPES = {
    "Llama-3.2-1B": (
        lambda: transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        8,
    ),
    "Gemma-2-2B": (
        lambda: transformers.Gemma2Config(
            vocab_size=256000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
            max_position_embeddings=8192,
        ),
        2,
    ),
    "gemma-3-270m": (
        lambda: transformers.Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            max_position_embeddings=32768,
        ),
        8,
    ),
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TINY = {
    "tiny llama": (lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), 2),
    "tiny gemma2": (lambda: transformers.Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=30.0), 2),
}


def say(*words):
    print(f"[{time.time() - START:5.0f} s]", *words, flush=True)


def left():
    return ARGS.seconds - (time.time() - START)


# --- the methods ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def liger(model, loss):
    """Liger's kernels on this instance, undone afterwards; loss: its fused linear cross-entropy, too."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    source = sys.modules[type(model).__module__]
    names = dict(vars(source))
    states = {m: dict(m.__dict__) for m in model.modules()}
    _apply_liger_kernel_to_instance(model=model, **({} if loss else {"fused_linear_cross_entropy": False}))
    try:
        yield
    finally:
        for module, state in states.items():
            module.__dict__.clear()
            module.__dict__.update(state)
        for name, value in list(vars(source).items()):
            if names.get(name) is not value:
                setattr(source, name, names[name]) if name in names else delattr(source, name)


@contextlib.contextmanager
def ours(model, mode="exact", layers=None, checkpointing=False):
    """calsmooth's loss; layers: what runs the decoder's layers, if not their own code."""
    if checkpointing:
        enable_gradient_checkpointing(model)
    try:
        with layers(model) if layers else contextlib.nullcontext(), fused_loss(model, 0.1, mode=mode):
            yield
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def trl(model):
    """TRL puts a head of its own into `forward`, and switches its gradient checkpointing on."""
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        model.gradient_checkpointing_disable()


def plain(model):
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Method:
    plugged: Callable[..., contextlib.AbstractContextManager[None]]
    trainer: str  # 'calsmooth', 'transformers' or 'trl'
    checkpointing: bool = False
    needs: str = ""  # a package


METHODS = {
    "Trainer (eager)": Method(plain, "transformers"),
    "Trainer + Liger": Method(partial(liger, loss=True), "transformers", needs="liger_kernel"),
    "TRL without checkpointing": Method(trl, "trl", needs="trl"),
    "TRL": Method(trl, "trl", checkpointing=True, needs="trl"),
    "calsmooth": Method(ours, "calsmooth"),
    "calsmooth filtered": Method(partial(ours, mode="filtered"), "calsmooth"),
    "calsmooth --compile": Method(partial(ours, layers=compiled_layers), "calsmooth"),
    "calsmooth --compile + checkpointing": Method(
        partial(ours, layers=compiled_layers, checkpointing=True), "calsmooth", checkpointing=True
    ),
    "calsmooth + Liger's layers": Method(
        partial(ours, layers=partial(liger, loss=False)), "calsmooth", needs="liger_kernel"
    ),
}


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **_):
        synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def empty():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def make_trainer(model, method, examples, batch, steps):
    shared = {
        "output_dir": str(Path(tempfile.gettempdir()) / "training_throughput"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "warmup_steps": 0,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "optim": "adamw_torch_fused" if CUDA else "adamw_torch",
        "max_grad_norm": 1.0,
        "seed": 0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    if method.trainer == "calsmooth":
        return SFTTrainer(
            model, TrainingArguments(**shared), examples, None,
            order=EpochOrder([ARGS.length] * len(examples), batch, 0), collate=Collator(0), loss_reduction="mean",
            keep_last=1, record=lambda values: None, stop=StopRequest(), batch_size=batch,
        )  # fmt: skip
    if method.trainer == "trl":
        from trl import SFTConfig
        from trl import SFTTrainer as TRLTrainer

        prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments = SFTConfig(**shared, **prepared, gradient_checkpointing=method.checkpointing)
        return TRLTrainer(model, arguments, train_dataset=as_dataset(examples), processing_class=tokenizer())
    return Trainer(model=model, args=TrainingArguments(**shared), train_dataset=examples, data_collator=Collator(0))


def as_dataset(examples):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def tokenizer():
    """TRL wants one; the rows are tokens already."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def train(model, method, examples, batch, steps):
    """Seconds of each step, and the peak memory, of so many steps, each of a whole batch."""
    clock = Clock()
    examples = [examples[i % len(examples)] for i in range(batch * steps)]
    empty()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    elif batch > TINY_MEMORY:
        raise torch.OutOfMemoryError
    trainer = None
    with method.plugged(model):
        try:
            trainer = make_trainer(model, method, examples, batch, steps)
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(clock)
            trainer.train()
            return clock.seconds, torch.cuda.max_memory_allocated() if CUDA else batch
        finally:
            if trainer is not None:
                tidy(trainer, model)
                del trainer


def tidy(trainer, model):
    trainer.optimizer = trainer.lr_scheduler = None
    # accelerate leaves its autocast around the model's forward,
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    # and a mark by which the next Trainer would leave the model as it is: without autocast.
    model.__dict__.pop("_is_accelerate_prepared", None)
    trainer.accelerator.free_memory()
    model.zero_grad(set_to_none=True)


def tried(model, method, examples, batch, steps=4):
    """As `train`; None where memory runs out."""
    try:
        return train(model, method, examples, batch, steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        empty()


def largest(model, method, examples, batch, peak):
    """The largest batch that trains (up to --most), its steps' seconds and its peak memory: memory grows by the row.

    peak: at `batch` rows.
    """
    memory = torch.cuda.get_device_properties(0).total_memory - RESERVED if CUDA else TINY_MEMORY
    other = batch * 2
    found = tried(model, method, examples, other)
    if found is None:
        other = max(batch // 2, 1)
        found = tried(model, method, examples, other)
    if found is None or other == batch:
        return batch, None, peak
    row = (found[1] - peak) / (other - batch)
    size = min(int(batch + (memory - peak) / row), ARGS.most)
    while size > max(batch, other):
        bigger = tried(model, method, examples, size)
        if bigger:
            return size, *bigger
        size -= max(1, size // 32)
    return (other, *found) if other > batch else (batch, None, peak)


# --- a shape ----------------------------------------------------------------------------------------------------------


def rows(count, vocabulary):
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(10, vocabulary, (ARGS.length,), generator=g).tolist()
        masked = max(1, round(ARGS.length * (1 - ARGS.targets)))
        made.append(Example(ids, [IGNORED] * masked + ids[masked:]))
    return made


def make(config):
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    weight = model.get_output_embeddings().weight
    spread = float(weight.detach().float().std()) * weight.shape[1] ** 0.5
    fold_temperature(model, spread / LOGIT_SPREAD)
    if softcap:
        model.config.final_logit_softcapping = softcap
    return model


def measure(name, config, batch):
    """Each method's results, by its name, on one model."""
    say(name)
    model = make(config)
    examples = rows(64, model.config.vocab_size)
    targets = examples[0].target_tokens
    results = {label: {} for label in CHOSEN}
    seconds = {label: [] for label in CHOSEN}
    for turn in range(ARGS.rounds):
        for label, method in CHOSEN.items():
            if "note" in results[label] or left() < 15:
                continue
            try:
                found = tried(model, method, examples, batch, ARGS.steps)
            except Exception as error:  # a peer that doesn't fit this version of transformers must not end the others
                results[label]["note"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            if found is None:
                results[label]["note"] = "out of memory"
                continue
            seconds[label] += found[0][ARGS.warm :]
            results[label]["peak_bytes"] = max(found[1], results[label].get("peak_bytes", 0))
        say(name, "round", turn + 1, {k: round(statistics.median(v) * 1e3) for k, v in seconds.items() if v})
    for label, times in seconds.items():
        if times:
            results[label] |= {
                "batch": batch, "median_ms": 1e3 * statistics.median(times), "fastest_ms": 1e3 * min(times),
                "steps": len(times), "target_tokens_per_s": batch * targets / statistics.median(times),
            }  # fmt: skip
    if not ARGS.no_largest:
        for label, method in CHOSEN.items():
            if "median_ms" in results[label] and left() > 30:
                size, times, peak = largest(model, method, examples, batch, results[label]["peak_bytes"])
                results[label] |= {"largest_batch": size, "largest_peak_bytes": peak}
                median = statistics.median(times[2:]) if times else results[label]["median_ms"] / 1e3
                results[label]["largest_target_tokens_per_s"] = size * targets / median
                say(name, label, "holds", size, f"{size * targets / median:,.0f} target tokens/s")
    return results


def table(all_results):
    for name, results in all_results.items():
        eager = results.get("Trainer (eager)", {})
        print(f"\n{name}: rows of {ARGS.length} tokens, {ARGS.targets:.0%} of them targets")
        print(
            f"{'method':36}{'batch':>6}{'ms/step':>9}{'tgt tok/s':>11}{'x eager':>9}{'peak GB':>9}"
            f"{'largest':>9}{'tgt tok/s':>11}{'x eager':>9}"
        )
        for label, r in results.items():

            def number(key, form, scale=1.0, r=r):
                return format(r[key] / scale, form) if key in r else ""

            def ratio(key, r=r, eager=eager):
                return f"{r[key] / eager[key]:.2f}" if key in r and key in eager else ""

            print(
                f"{label:36}{r.get('batch', ''):>6}"
                f"{number('median_ms', '.1f'):>9}{number('target_tokens_per_s', ',.0f'):>11}"
                f"{ratio('target_tokens_per_s'):>9}{number('peak_bytes', '.1f', 1e9):>9}"
                f"{r.get('largest_batch', ''):>9}{number('largest_target_tokens_per_s', ',.0f'):>11}"
                f"{ratio('largest_target_tokens_per_s'):>9}  {r.get('note', '')}"
            )


def save(everything):
    peers = ("transformers", "liger-kernel", "trl", "accelerate", "triton")
    content = {
        "command": COMMAND,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": {"torch": torch.__version__} | {name: version(name) for name in peers},
        "length": ARGS.length, "targets": ARGS.targets, "rounds": ARGS.rounds, "results": everything,
    }  # fmt: skip
    ARGS.output.parent.mkdir(parents=True, exist_ok=True)
    ARGS.output.write_text(json.dumps(content, indent=1) + "\n")


def command_line(parser):
    """The options that aren't the defaults; where the results went is nobody's business."""
    given = {
        name: value for name, value in vars(ARGS).items() if value != parser.get_default(name) and name != "output"
    }
    flags = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value!r}") for name, value in given.items())
    return " ".join(["python training_throughput.py", *flags])


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    shapes = TINY if ARGS.tiny else {k: v for k, v in SHAPES.items() if not ARGS.only or k in ARGS.only.split(",")}
    everything = {}
    for name, (config, batch) in shapes.items():
        if left() < 30:
            say("no time left for", name)
            continue
        everything[name] = measure(name, config, batch)
        empty()
        save(everything)
    table(everything)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="names of shapes, with commas")
    parser.add_argument("--method", default="", help="names of methods, with commas")
    parser.add_argument("--no-largest", action="store_true")
    parser.add_argument("--most", type=int, default=128, help="rows of the largest batch that is tried")
    parser.add_argument("--length", type=int, help="tokens of a row (default: 1024; --tiny: 32)")
    parser.add_argument("--targets", type=float, default=0.6, help="share of a row's tokens that are targets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600.0, help="no new work begins after so many")
    parser.add_argument("--output", type=Path, default=Path("training_throughput.json"))
    ARGS = parser.parse_args()
    COMMAND = command_line(parser)
    ARGS.length = ARGS.length or (32 if ARGS.tiny else 1024)
    names = ARGS.method.split(",") if ARGS.method else list(METHODS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"--method: {', '.join(sorted(unknown))}: expected some of {', '.join(METHODS)}")
    CHOSEN = {
        label: method
        for label, method in METHODS.items()
        if label in names and (not method.needs or importlib.util.find_spec(method.needs))
    }
    main()
