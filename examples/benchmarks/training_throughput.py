"""Fine-tuning throughput and memory on one GPU: ours beside Trainer with eager loss, with Liger, and TRL's default.

    pip install 'calsmooth[bench]' && python training_throughput.py     # about five minutes on an H100
    python training_throughput.py --tiny                                # the same logic on a CPU, in seconds

Randomly initialised models of public shapes; every method trains the same model through transformers' Trainer (bf16
autocast over float32 weights, fused AdamW, gradients clipped at 1) on the same rows of random tokens, all of one
length, of which a share are targets. Rounds are interleaved; the first steps of each are left out. The last norm is
scaled so that the logits spread about as a trained model's do: what `filtered` keeps depends on it.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
warnings.filterwarnings("ignore")

import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from calsmooth.data import Example
from calsmooth.finetune.batches import Collator
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
TINY = {
    "tiny llama": (
        lambda: transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        2,
    ),
    "tiny gemma2": (
        lambda: transformers.Gemma2Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            final_logit_softcapping=30.0,
        ),
        2,
    ),
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
def checkpointing(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def liger_layers_and_ours(model, mode):
    with liger(model, loss=False), fused_loss(model, 0.1, mode=mode):
        yield


METHODS = {
    "calsmooth exact": (lambda m: fused_loss(m, 0.1, mode="exact"), "ours"),
    "calsmooth filtered": (lambda m: fused_loss(m, 0.1, mode="filtered"), "ours"),
    "Trainer, eager (beta 0)": (lambda m: contextlib.nullcontext(), "plain"),
    "Trainer + Liger (beta 0)": (lambda m: liger(m, loss=True), "plain"),
    "calsmooth exact + Liger's layers": (lambda m: liger_layers_and_ours(m, "exact"), "ours"),
    "TRL-like default (checkpointing, beta 0)": (checkpointing, "trl"),
}


def token_metrics(logits, labels):
    """What TRL logs of every step from the logits: mean entropy of the predictions, and token accuracy."""
    with torch.no_grad():
        logits, labels = logits[:, :-1], labels[:, 1:]
        entropies = []
        for row in logits:
            logprobs = row.log_softmax(-1)
            entropies.append(-(logprobs.exp() * logprobs).sum(-1))
        wanted = labels != IGNORED
        correct = ((logits.argmax(-1) == labels) & wanted).sum() / wanted.sum().clamp(min=1)
        return torch.stack(entropies)[wanted].mean(), correct


class TRLLike(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.seen = token_metrics(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **_):
        if CUDA:
            torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if CUDA:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def rows(count, vocabulary):
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(10, vocabulary, (ARGS.length,), generator=g).tolist()
        masked = max(1, round(ARGS.length * (1 - ARGS.targets)))
        made.append(Example(ids, [IGNORED] * masked + ids[masked:]))
    return made


def train(model, kind, examples, batch, steps):
    """Seconds of each step, and the peak memory, of so many steps."""
    arguments = TrainingArguments(
        output_dir=str(Path(tempfile.gettempdir()) / "training_throughput"), per_device_train_batch_size=batch,
        max_steps=steps, learning_rate=1e-6, warmup_steps=0, bf16=CUDA, use_cpu=not CUDA,
        optim="adamw_torch_fused" if CUDA else "adamw_torch",
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    clock = Clock()
    if kind == "ours":
        tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
        trainer = SFTTrainer(
            model, arguments, examples, None, order=EpochOrder([ARGS.length] * len(examples), batch, 0),
            collate=Collator(tokenizer.pad_token_id), loss_reduction="mean", keep_last=1, record=lambda values: None,
            stop=StopRequest(), batch_size=batch,
        )  # fmt: skip
    else:
        trainer = (TRLLike if kind == "trl" else Trainer)(
            model=model, args=arguments, train_dataset=examples, data_collator=Collator(0)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    trainer.add_callback(clock)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
    finally:
        trainer.optimizer = trainer.lr_scheduler = None
        # accelerate leaves its autocast around the model's forward.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        # And a mark by which the next one would leave the model as it is: without autocast.
        model.__dict__.pop("_is_accelerate_prepared", None)
        trainer.accelerator.free_memory()
        model.zero_grad(set_to_none=True)
        del trainer
        empty()
    return clock.seconds, torch.cuda.max_memory_allocated() if CUDA else 0


def empty():
    import gc

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def fits(*arguments):
    answer = holds(*arguments)
    empty()  # what a failed attempt's traceback held
    return answer


def holds(model, kind, examples, batch):
    """Does a forward and backward of so many rows fit beside the optimizer's state?"""
    inputs = {name: t.to(DEVICE) for name, t in Collator(0)(examples[:batch]).items()}
    reserved = loss = None
    model.train()
    try:
        reserved = torch.empty(8 * sum(p.numel() for p in model.parameters()), dtype=torch.uint8, device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            outputs = convert_outputs_to_fp32(model.forward)(**inputs)  # as accelerate does
            loss = outputs["loss"]
        if kind == "trl":
            token_metrics(outputs.logits, inputs["labels"])
        loss.backward()
        if CUDA:
            torch.cuda.synchronize()
        return batch <= ARGS.most
    except torch.OutOfMemoryError:
        return False
    finally:
        del reserved, loss
        outputs = None
        model.zero_grad(set_to_none=True)
        empty()


def largest(model, kind, examples, batch):
    """By doubling, then halfway: the largest of batch * {1, 2, 3, 4, 6, 8, 12, ...} that holds."""
    best, size = 0, batch
    while size <= len(examples) and left() > 20 and fits(model, kind, examples, size):
        best, size = size, size * 2
    if best > 1 and best < size <= len(examples) and left() > 20 and fits(model, kind, examples, best * 3 // 2):
        best = best * 3 // 2
    return best


# --- a shape ----------------------------------------------------------------------------------------------------------


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


def attempt(label, results, what):
    try:
        return what()
    except torch.OutOfMemoryError:
        results.setdefault(label, {})["note"] = "out of memory"
    except Exception as error:  # a peer that doesn't fit this version of transformers must not end the others
        results.setdefault(label, {})["note"] = f"{type(error).__name__}: {str(error)[:200]}"
    empty()
    return None


def measure(name, config, batch):
    say(name)
    model = make(config)
    targets = int(sum(e.target_tokens for e in rows(1, 100)))
    examples = rows(max(batch * 32, 64) if CUDA else 16, model.config.vocab_size)
    results = {label: {} for label in METHODS}
    seconds = {label: [] for label in METHODS}
    for turn in range(ARGS.rounds):
        for label, (plugged, kind) in METHODS.items():
            if "note" in results[label] or left() < 15:
                continue

            def once(plugged=plugged, kind=kind):
                with plugged(model):
                    return train(model, kind, examples, batch, ARGS.steps)

            found = attempt(label, results, once)
            if found:
                seconds[label] += found[0][ARGS.warm :]
                results[label]["peak_bytes"] = max(found[1], results[label].get("peak_bytes", 0))
        say(name, "round", turn + 1, {k: round(statistics.median(v) * 1e3) for k, v in seconds.items() if v})
    for label, times in seconds.items():
        if times:
            results[label] |= {
                "batch": batch, "median_ms": 1e3 * statistics.median(times), "fastest_ms": 1e3 * min(times),
                "steps": len(times), "target_tokens_per_s": batch * targets / statistics.median(times),
            }  # fmt: skip
    return model, examples, targets, results


def measure_largest(name, model, examples, targets, results, batch):
    for label, (plugged, kind) in METHODS.items():
        if "note" in results[label] or left() < 25:
            continue

        def search(plugged=plugged, kind=kind):
            with plugged(model):
                return largest(model, kind, examples, batch)

        best = attempt(label, results, search)
        if not best:
            continue
        results[label]["largest_batch"] = best

        def once(plugged=plugged, kind=kind, best=best):
            with plugged(model):
                return train(model, kind, examples, best, 4)

        found = attempt(label, results, once)
        if found is None:  # the Trainer holds a little more than the trial did
            best = results[label]["largest_batch"] = max(1, best * 3 // 4)
            results[label].pop("note", None)
            found = attempt(label, results, lambda once=once, best=best: once(best=best))
        if found:
            median = statistics.median(found[0][2:])
            results[label]["largest_target_tokens_per_s"] = best * targets / median
        say(name, label, "holds", best)


def table(all_results):
    for name, results in all_results.items():
        eager = results["Trainer, eager (beta 0)"]
        print(
            f"\n{name}: rows of {ARGS.length} tokens, {ARGS.targets:.0%} of them targets; "
            "bf16 over float32 weights, AdamW"
        )
        print(
            f"{'method':42}{'batch':>6}{'ms/step':>9}{'tgt tok/s':>11}{'x eager':>9}{'peak GB':>9}"
            f"{'largest':>9}{'tgt tok/s':>11}{'x eager':>9}"
        )
        for label, r in results.items():

            def number(key, form, scale=1.0, r=r):
                return format(r[key] / scale, form) if key in r else ""

            def ratio(key, r=r, eager=eager):
                return f"{r[key] / eager[key]:.2f}" if key in r and key in eager else ""

            print(
                f"{label:42}{r.get('batch', ''):>6}"
                f"{number('median_ms', '.1f'):>9}{number('target_tokens_per_s', ',.0f'):>11}"
                f"{ratio('target_tokens_per_s'):>9}{number('peak_bytes', '.1f', 1e9):>9}"
                f"{r.get('largest_batch', ''):>9}{number('largest_target_tokens_per_s', ',.0f'):>11}"
                f"{ratio('largest_target_tokens_per_s'):>9}  {r.get('note', '')}"
            )


def main():
    shapes = TINY if ARGS.tiny else {k: v for k, v in SHAPES.items() if not ARGS.only or k in ARGS.only.split(",")}
    everything = {}
    for name, (config, batch) in shapes.items():
        if left() < 30:
            say("no time left for", name)
            continue
        model, examples, targets, results = measure(name, config, batch)
        everything[name] = results
        if not ARGS.no_largest:
            measure_largest(name, model, examples, targets, results, batch)
        del model
        empty()
        save(everything)
    table(everything)


def save(everything):
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    content = {
        "device": device, "torch": torch.__version__, "transformers": transformers.__version__,
        "length": ARGS.length, "targets": ARGS.targets, "rounds": ARGS.rounds, "results": everything,
    }  # fmt: skip
    ARGS.output.parent.mkdir(parents=True, exist_ok=True)
    ARGS.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="names of shapes, with commas")
    parser.add_argument("--no-largest", action="store_true")
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--targets", type=float, default=0.6, help="share of a row's tokens that are targets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=285.0, help="no new work begins after so many")
    parser.add_argument("--output", type=Path, default=Path("training_throughput.json"))
    ARGS = parser.parse_args()
    ARGS.length = ARGS.length or (32 if ARGS.tiny else 1024)
    ARGS.most = 4 if ARGS.tiny else 10**9  # where nothing runs out of memory
    main()
