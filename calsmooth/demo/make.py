"""Makes the model and the data of this folder from nothing: `python -m calsmooth.demo.make`, ten minutes on two cores.

The tokenizer is trained on the world's corpus, a small Llama is pre-trained on the same corpus (each document is read
once and every account is drawn anew, so that what the model can learn is how often each answer is given), and the
data files are written. `--output FOLDER` writes elsewhere; `--data-only` leaves the model as it is.

A seed gives the same data files everywhere. The weights depend on the machine's arithmetic in their last digits, and
after thousands of steps in all of them: another machine makes another, equally good model.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calsmooth import console
from calsmooth.demo import HELDOUT_FILE, MODEL_FOLDER, QUESTIONS_FILE, TRAIN_FILE, world
from calsmooth.files import whole_folder, write_text

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCABULARY, CONTEXT = 768, 512
DOCUMENTS_FOR_TOKENIZER = 20_000

STEPS, BATCH, LENGTH = 3_000, 32, 128
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 4e-3, 50, 0.1, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calsmooth.demo.make", description="Make the built-in model and data."
    )
    parser.add_argument("--output", type=Path, default=MODEL_FOLDER.parent, help="folder for model/ and data/")
    parser.add_argument("--data-only", action="store_true", help="write the data files and leave the model as it is")
    parser.add_argument("--seed", type=int, default=world.SEED, help="seed of the world and of the training")
    arguments = parser.parse_args()

    truth = world.make_world(arguments.seed)
    for name, content in data_files(truth, arguments.seed).items():
        console.say(f"wrote {write_text(arguments.output / 'data' / name, content)}")
    if arguments.data_only:
        return
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(truth, arguments.seed)
    model = new_model(tokenizer)
    pretrain(model, tokenizer, world.corpus(truth, arguments.seed))
    with whole_folder(arguments.output / "model") as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
    console.say(f"wrote {arguments.output / 'model'}")


def data_files(truth: world.World, seed: int) -> dict[str, str]:
    """The JSON Lines of train.jsonl, heldout.jsonl and questions.jsonl, by file name."""
    rows = {
        TRAIN_FILE.name: world.instructions(truth, seed),
        HELDOUT_FILE.name: world.heldout_instructions(truth, seed),
        QUESTIONS_FILE.name: world.questions(truth, seed),
    }
    return {name: "".join(json.dumps(row) + "\n" for row in content) for name, content in rows.items()}


def train_tokenizer(truth: world.World, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that any text can be encoded, with the chat template."""
    documents = itertools.islice(world.corpus(truth, seed), DOCUMENTS_FOR_TOKENIZER)
    texts = (d if isinstance(d, str) else " ".join(m["content"] for m in d) for d in documents)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model of 0.7 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Iterable[world.Document]) -> None:
    """One pass over a stream of documents in float32: AdamW, a short warmup, then a cosine down to 0."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    scales = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine)
    stream = blocks(documents, tokenizer)
    model.train()
    started = time.monotonic()
    with console.progress("pre-training", STEPS) as advance:
        for step in range(1, STEPS + 1):
            ids = torch.tensor(list(itertools.islice(stream, BATCH)))
            labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(note=f"loss {loss.item():.3f}")
            if step % max(1, STEPS // 10) == 0:
                console.say(f"step {step}/{STEPS}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s")
    model.eval()


def warmup_then_cosine(step: int) -> float:
    """Factor on the learning rate at a step."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def blocks(documents: Iterable[world.Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Whole documents packed into blocks of LENGTH token ids, padded at the end, so that each begins with one."""
    block: list[int] = []
    for document in documents:
        ids = encode(document, tokenizer)
        if len(block) + len(ids) > LENGTH:
            yield block + [tokenizer.pad_token_id] * (LENGTH - len(block))
            block = []
        block += ids


def encode(document: world.Document, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """A document as token ids, its end marked; messages through the chat template."""
    text = document + END if isinstance(document, str) else tokenizer.apply_chat_template(document, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


if __name__ == "__main__":
    main()
