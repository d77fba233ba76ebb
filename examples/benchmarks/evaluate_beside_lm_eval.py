"""`calsmooth evaluate` and lm-evaluation-harness on the same MMLU questions, one right after the other.

    pip install lm_eval[hf]
    python evaluate_beside_lm_eval.py --model DIR --data-dir mmlu --dtype bfloat16 --device cuda

--data-dir has the official CSV files (dev/ and test/). Both get lm-evaluation-harness's own MMLU prompt, five solved
examples, and each a process of its own, so that memory and start-up are its own. Each first answers --warm-up
questions of two subjects, so that `seconds` (tokenising and model) hold no loading of libraries and no compiling of
kernels; `whole_seconds`, of the process, hold everything. Printed, and written to --output: questions a second, peak
memory, accuracy, and how far the log-probabilities of the choices are apart. Where other programs share the machine,
compare processor seconds.

--without-reuse also runs calsmooth with every prompt in full. A model folder without weights is given random ones.
"""

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Samples = dict[str, dict[str, Any]]  # by question: logprobs of the four choices, gold


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.model = with_weights(options.model, folder)
        prepare(options, folder)
        report: dict[str, Any] = {"model": options.model.name, "dtype": options.dtype, "device": options.device}
        ours = run("calsmooth", options, folder, report)
        if options.without_reuse:
            full = run("without reuse", options, folder, report)
            report["without reuse"] |= differences(ours, full)
        if not options.only_calsmooth:
            theirs = run("lm_eval", options, folder, report)
            report["comparison"] = differences(ours, theirs) | ratios(report["calsmooth"], report["lm_eval"])
        text = json.dumps(report, indent=2)
        print(text)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("evaluate_beside_lm_eval.json"))
    parser.add_argument("--subjects", default="", help="separated by commas (default: all)")
    parser.add_argument("--limit", type=int, help="the first so many questions of each subject (default: all)")
    parser.add_argument("--warm-up", type=int, default=8, help="questions of two subjects each, before the clock runs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lm-eval-batch-size", default="1", help="a number, or auto")
    parser.add_argument("--lm-eval-python", default=sys.executable, help="of another environment that has lm_eval")
    parser.add_argument("--without-reuse", action="store_true")
    parser.add_argument("--only-calsmooth", action="store_true")
    parser.add_argument("--work", choices=("calsmooth", "without reuse", "lm_eval"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def with_weights(model: Path, folder: Path) -> Path:
    if any(model.glob("*.safetensors")):
        return model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(model, folder / "random")
    config = AutoConfig.from_pretrained(model)
    config.initializer_range = 0.1  # the usual 0.02 makes all choices about as likely as each other
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "random")
    return folder / "random"


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """All chosen questions in the folder, and a few of two subjects in its folder `first`."""
    all_subjects = (path.name.removesuffix("_test.csv") for path in (options.data_dir / "test").glob("*_test.csv"))
    subjects = options.subjects.split(",") if options.subjects else sorted(all_subjects)
    write_questions(options.data_dir, subjects, options.limit, folder)
    write_questions(options.data_dir, subjects[:2], options.warm_up, folder / "first")


def write_questions(data_dir: Path, subjects: list[str], limit: int | None, folder: Path) -> None:
    """As official CSV files for one and as JSON Lines with a task file a subject for the other."""
    for name in ("mmlu/test", "mmlu/dev", "tasks"):
        (folder / name).mkdir(parents=True)
    for subject in subjects:
        files = {}
        for split, most in (("dev", None), ("test", limit)):
            with open(data_dir / split / f"{subject}_{split}.csv", encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if row][:most]
            with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
            lines = [
                json.dumps({"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5].strip())})
                for row in rows
            ]
            files[split] = str(folder / f"{subject}_{split}.jsonl")
            Path(files[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tasks" / f"local_{subject}.yaml").write_text(json.dumps(task_file(subject, files)))


def task_file(subject: str, files: dict[str, str]) -> dict[str, Any]:
    """lm-evaluation-harness's MMLU task of a subject, reading local files. (JSON is YAML.)"""
    about = subject.replace("_", " ")
    listed = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate("ABCD"))
    return {
        "task": f"local_{subject}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
        "doc_to_text": "{{question.strip()}}" + listed + "\nAnswer:",
        "doc_to_choice": list("ABCD"),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def run(work: str, options: argparse.Namespace, folder: Path, report: dict[str, Any]) -> Samples:
    """Do the work in a process of its own; its measurements go into the report."""
    command = [options.lm_eval_python if work == "lm_eval" else sys.executable, __file__, *sys.argv[1:]]
    started = time.perf_counter()
    subprocess.run([*command, "--model", options.model, "--work", work, "--folder", folder], check=True)
    whole = time.perf_counter() - started
    found = json.loads((folder / f"{work}.json").read_text())
    samples: Samples = found.pop("samples")
    n = len(samples)
    right = sum(answer(sample) == sample["gold"] for sample in samples.values())
    report[work] = found | {
        "whole_seconds": whole,
        "questions": n,
        "accuracy": right / n,
        "questions_per_second": n / found["seconds"],
        "questions_per_processor_second": n / found["processor_seconds"],
    }
    print(work, json.dumps(report[work]), flush=True)
    return samples


def differences(a: Samples, b: Samples) -> dict[str, Any]:
    if a.keys() != b.keys():
        raise SystemExit("the two didn't score the same questions")
    gaps = [abs(x - y) for name in a for x, y in zip(a[name]["logprobs"], b[name]["logprobs"], strict=True)]
    return {
        "largest_difference": max(gaps),
        "mean_difference": sum(gaps) / len(gaps),
        "other_answers": sum(answer(a[name]) != answer(b[name]) for name in a),
    }


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    return {
        "times_faster": theirs["seconds"] / ours["seconds"],
        "times_faster_in_processor_seconds": theirs["processor_seconds"] / ours["processor_seconds"],
        "times_faster_whole": theirs["whole_seconds"] / ours["whole_seconds"],
        "share_of_their_memory": ours["peak_bytes"] / theirs["peak_bytes"],
    }


def answer(sample: dict[str, Any]) -> int:
    return max(range(4), key=sample["logprobs"].__getitem__)


# --- in the processes of their own ----------------------------------------------------------------------------------


class Clock:
    """Seconds on the wall and of the processor that a function takes, over all of its calls."""

    def __init__(self) -> None:
        self.seconds = self.processor_seconds = 0.0

    def on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - started[0]
                self.processor_seconds += time.process_time() - started[1]

        return timed


def calsmooth_work(options: argparse.Namespace) -> dict[str, Any]:
    from calsmooth.cli.app import app
    from calsmooth.evaluate import run as evaluation

    shared = ["evaluate", "--model", options.model, "--task", "mmlu", "--prompt-style", "lm-eval", "--quiet"]
    shared += ["--dtype", options.dtype, "--device", options.device]
    shared += ["--no-reuse"] if options.work == "without reuse" else []

    def evaluate(data: Path, output: Path) -> None:
        app([*map(str, shared), "--data-dir", str(data), "--output", str(output)], standalone_mode=False)

    name = options.work.replace(" ", "-")
    evaluate(options.folder / "first", options.folder / f"first-{name}")
    gc.collect()  # its model, which the next one needn't lie beside
    clock, output = Clock(), options.folder / name
    evaluation.perform = clock.on(evaluation.perform)
    evaluate(options.folder, output)
    results = json.loads((output / "results.json").read_text())
    predictions = map(json.loads, (output / "predictions.jsonl").read_text().splitlines())
    task = results["tasks"]["mmlu"]
    return {
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "peak_bytes": results["peak_memory_bytes"],
        "tokens_run": task["tokens_run"],
        "tokens_in_full": task["tokens_in_full"],
        "notes": results["notes"],
        "device": results["device"],
        "versions": results["versions"],
        # A question's id is its row, or its subject and row.
        "samples": {
            f"{p['subject']}/{p['id'].rpartition('/')[2]}": {"logprobs": p["logprobs"], "gold": p["gold"]}
            for p in predictions
        },
    }


def lm_eval_work(options: argparse.Namespace) -> dict[str, Any]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    size = options.lm_eval_batch_size
    model = HFLM(
        pretrained=str(options.model),
        dtype=options.dtype,
        device=options.device,
        batch_size=size if size == "auto" else int(size),
    )

    def evaluate(folder: Path) -> dict[str, Any]:
        found = simple_evaluate(
            model=model,
            tasks=sorted(path.stem for path in (folder / "tasks").glob("*.yaml")),
            num_fewshot=5,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        )
        return dict(found["samples"])

    evaluate(options.folder / "first")
    clock, forward_clock = Clock(), Clock()
    model.loglikelihood = clock.on(model.loglikelihood)  # tokenising and model
    model._loglikelihood_tokens = forward_clock.on(model._loglikelihood_tokens)
    found = evaluate(options.folder)
    on_gpu = options.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "seconds_without_tokenising": forward_clock.seconds,
        "peak_bytes": peak,
        "batch_size": size,
        "version": importlib.metadata.version("lm_eval"),
        "samples": {
            f"{task.removeprefix('local_')}/{sample['doc_id']}": {
                "logprobs": [float(response[0]) for response in sample["filtered_resps"]],
                "gold": sample["doc"]["answer"],
            }
            for task, samples in found.items()
            for sample in samples
        },
    }


if __name__ == "__main__":
    asked = parse()
    if asked.work is None:
        main()
    else:
        result = lm_eval_work(asked) if asked.work == "lm_eval" else calsmooth_work(asked)
        (asked.folder / f"{asked.work}.json").write_text(json.dumps(result))
