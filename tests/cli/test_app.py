"""The command line as its users meet it: help without torch, one line for every error, the right exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("finetune", "evaluate", "calibrate", "bench", "entropy-bound")


def calsmooth(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "calsmooth", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_help_names_the_five_commands() -> None:
    done = calsmooth("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout)


def test_help_shows_them_in_the_order_of_their_use() -> None:
    shown = re.findall(rf"^. ({'|'.join(COMMANDS)}) ", calsmooth("--help").stdout, flags=re.MULTILINE)
    assert tuple(shown) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = calsmooth(command, "--help")
    assert done.returncode == 0
    assert "--config" in done.stdout
    assert "--json" in done.stdout
    # A switch takes no value, and one that is off anyway needs no flag that says so.
    assert not re.search(r"--(json|quiet|resume|autotune).*<bool>", done.stdout)
    assert set(re.findall(r"--no-[a-z]+", done.stdout)) <= {"--no-cache", "--no-reuse", "--no-FLAG"}


def test_a_flag_wins_over_a_switch_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("streaming: true\npacking: true\nmax_steps: 2\n")
    command = ("finetune", "--config", "c.yaml", "--dry-run", "--json")
    assert '"streaming": true' in calsmooth(*command, cwd=tmp_path).stdout
    done = calsmooth(*command, "--no-streaming", cwd=tmp_path)
    assert '"streaming": false' in done.stdout, done.stderr
    assert '"packing": true' in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, calsmooth.cli.app as a\n"
        "try: a.app(['--help'], standalone_mode=False)\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch','transformers','datasets','matplotlib','numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_version() -> None:
    import calsmooth as package

    assert calsmooth("--version").stdout == f"calsmooth {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["finetune", "--beta", "1.5"], 2, "error: --beta must be at least 0 and below 1, got 1.5"),
        (["finetune", "--beta", "much"], 2, "error: --beta must be a number, got 'much'"),
        (["finetune", "--limit", "1.5"], 2, "error: --limit must be a whole number, got '1.5'"),
        (["bench", "--vocab", "100,many"], 2, "error: --vocab must be a whole number, got 'many'"),
        (["finetune", "--bta", "0.1"], 2, "No such option: --bta"),
        (["bench", "more"], 2, "calsmooth bench --help)"),
        (["fine"], 2, "fine"),
        (["finetune", "--config", "none.yaml"], 2, "none.yaml: can't be read"),
        (["evaluate", "--model", "./none"], 2, "--model ./none: no such folder"),
        (["calibrate", "none.jsonl"], 2, "none.jsonl"),
        (["evaluate", "--device", "cuda:99"], 2, "--device cuda:99: not available here"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = calsmooth(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not any(tmp_path.rglob("*.json*")), "nothing may be left behind by a refused command"


def test_an_unknown_key_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("btea: 0.1\n")
    done = calsmooth("finetune", "--config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: c.yaml: unknown key 'btea'; did you mean 'beta'?"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = calsmooth("finetune", "--beta", "1.5", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
