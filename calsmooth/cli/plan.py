"""`calsmooth finetune --dry-run`: what a run would read, learn, take and need."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.cli.options import Output
from calsmooth.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from calsmooth.data import Example
    from calsmooth.finetune.memory import MemoryEstimate
    from calsmooth.finetune.plan import Plan


def show_plan(config: FinetuneConfig, output: Output) -> None:
    """The resolved configuration, one example with its masked part dimmed, tokens, steps and memory."""
    from rich.console import Group
    from rich.text import Text

    from calsmooth.finetune.memory import micro_batch_and_memory
    from calsmooth.finetune.plan import prepare

    plan, tokenizer = prepare(config)
    plan, memory = micro_batch_and_memory(plan)
    warn_of_bad_rows(plan)
    shown: list[Any] = [
        Text(plan.config.to_yaml()),
        Text("The first example; what is dim is read, what stands bold in « » is learned:", style="italic"),
        render_example(plan.examples.examples[0], tokenizer),
        Text(),
        *plan_lines(plan),
        *memory_lines(memory, plan),
    ]
    output.show(Group(*shown), result=_answer(plan, memory))


def plan_lines(plan: "Plan") -> list[str]:
    """What a run comes to, for people."""
    e, config = plan.examples, plan.config
    left_out = {"bad": e.bad, "without a response within --max-length": e.dropped}
    notes = [f"{n:,} {why} left out" for why, n in left_out.items() if n]
    notes += [f"{e.truncated:,} cut at --max-length"] if e.truncated else []
    more = f" ({', '.join(notes)})" if notes else ""
    beginning = "A stream, which begins with " if plan.endless else ""
    tokens = int(e.examples.lengths.sum())
    lines = [
        f"{beginning}{e.rows:,} rows{more}, format {e.format}, template {e.template}: "
        f"{tokens:,} tokens, {plan.target_tokens:,} of them targets."
    ]
    if len(e.sources) > 1 and e.sources[0].weight is not None:
        shares = zip(e.sources, plan.order.quotas, strict=True)
        lines += [f"  {s.name}: {quota:,} examples an epoch, of {s.examples:,}" for s, quota in shares]
    steps = f"{plan.steps:,} steps of {config.batch_size} examples ({plan.accumulation} x {plan.micro_batch})"
    if plan.endless is None:
        padding, other = plan.padding_share(config.packing), plan.padding_share(not config.packing)
        instead = "without --packing" if config.packing else "with --packing"
        steps += f"; {padding:.1%} of what the model reads is padding ({instead}: {other:.1%})"
    return [*lines, f"{steps}."]


def warn_of_bad_rows(plan: "Plan") -> None:
    bad = plan.examples.bad
    if bad:
        rows = "1 bad row is" if bad == 1 else f"{bad:,} bad rows are"
        console.warn(f"{rows} left out, the first: {plan.examples.bad_rows[0]}")


def memory_lines(memory: "MemoryEstimate", plan: "Plan") -> list[str]:
    """The estimate and its parts."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        plan.config.optimizer: memory.optimizer,
        f"copies in {plan.config.dtype}": memory.low_precision if plan.config.dtype != "float32" else 0,
        "activations": memory.activations,
        "loss": memory.loss,
    }
    named = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    beyond = "" if memory.activations is not None else "; activations can't be counted for this architecture"
    compiled = ["The activations are those of uncompiled layers: with --compile, an upper bound."]
    return [
        f"Memory, at micro-batches of {memory.rows} x {memory.width} tokens: about {_size(memory.total)} "
        f"({named}{beyond}), and what the allocator and the libraries take.",
        *(compiled if plan.config.compile and memory.activations is not None else []),
        f"Logits that the fused loss doesn't make: {_size(memory.full_logits)}.",
    ]


def render_example(example: "Example", tokenizer: "PreTrainedTokenizerBase") -> "Text":
    """The text, its ignored part dim, its learned part bold between marks that also a file shows."""
    from rich.text import Text

    from calsmooth.data import IGNORED

    text = Text()
    # Stretches, not tokens, are decoded: a character may be made of several tokens.
    for ignored, stretch in groupby(range(len(example.labels)), key=lambda i: example.labels[i] == IGNORED):
        part = str(tokenizer.decode([example.input_ids[i] for i in stretch]))
        text.append(part if ignored else f"«{part}»", style="dim" if ignored else "bold green")
    return text


def _answer(plan: "Plan", memory: "MemoryEstimate") -> dict[str, Any]:
    """For --json."""
    examples = plan.examples
    return {
        "config": plan.config.to_dict(),
        **plan.rows_read(),
        "bad_rows": list(examples.bad_rows),
        "format": examples.format,
        "template": examples.template,
        "sources": [vars(source) for source in examples.sources],
        "tokens": int(examples.examples.lengths.sum()),
        "target_tokens": plan.target_tokens,
        "micro_batch_size": plan.micro_batch,
        "accumulation": plan.accumulation,
        "steps": plan.steps,
        "padding": None if plan.endless else plan.padding_share(plan.config.packing),
        "memory": {**vars(memory), "total": memory.total},
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
