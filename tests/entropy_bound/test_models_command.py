"""`calsmooth entropy-bound --model` from the command line to its files."""

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from calsmooth.cli.app import app
from calsmooth.errors import CalsmoothError


def calsmooth(*arguments):
    """Within this process, which has torch loaded already."""
    app(["entropy-bound", *map(str, arguments)], standalone_mode=False)


@pytest.fixture(scope="module")
def two_models(model_folders, tmp_path_factory, words):
    """Both models on one text, as JSON."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "text.txt").write_text(words(300))
    weak, strong = model_folders
    options = ["--text", "text.txt", "--beta", "0.1,0.9", "--json", "-o", "out"]
    command = [sys.executable, "-m", "calsmooth", "entropy-bound", "-m", weak, "-m", strong, *options]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_json_is_alone_on_standard_output_and_in_the_file(two_models, tokenizer):
    folder, done = two_models
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout)
    assert models == json.loads((folder / "out" / "heads.json").read_text())
    weak, strong = models
    assert (weak["vocab"], weak["hidden"]) == (strong["vocab"], strong["hidden"]) == (len(tokenizer), 32)
    assert weak["entropy_lower_bound"] > 1 > strong["entropy_lower_bound"] >= 0
    for m in models:
        assert m["rho"] == pytest.approx(m["head"]["sigma_c"] * m["hidden_states"]["sigma_h"])
        assert m["entropy"]["min"] >= m["floors"]["token"]["min"] >= m["entropy_lower_bound"]
        assert m["entropy_upper_bound"] >= m["entropy"]["max"]
        assert m["calibration"]["n"] == m["diversity"]["tokens"]
        assert [s["beta"] for s in m["smoothing"]] == [0.1, 0.9]
    assert strong["attained"]["entropy"] < weak["attained"]["entropy"]


def test_tables_pictures_and_lines_are_written(two_models):
    folder, _ = two_models
    out = folder / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        f"heads.{suffix}" for suffix in ("csv", "json", "pdf", "png", "svg")
    ]
    rows = list(csv.DictReader((out / "heads.csv").open()))
    models = json.loads((out / "heads.json").read_text())
    assert [float(r["diversity.effective_rank"]) for r in rows] == [m["diversity"]["effective_rank"] for m in models]
    assert float(rows[0]["smoothing.0.1.excess"]) == models[0]["smoothing"][0]["excess"]
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(out / "heads.svg").getroot().tag.endswith("svg")


def test_the_built_in_text_and_the_words_for_a_person(model_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calsmooth("--model", model_folders[1], "--max-tokens", "200")
    said = capsys.readouterr().out
    assert "Theorem 4.2" in said
    assert "strong, beta = 0.1: The head can be over-confident" in said
    assert "Assumes that the text is like the data to come" in said
    (one,) = json.loads((tmp_path / "runs" / "entropy-bound-strong" / "heads.json").read_text())
    assert one["calibration"]["n"] == 200


def test_instruction_data_counts_its_responses_only(model_folders, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": words(5, i), "completion": " the cat eats"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calsmooth("-m", model_folders[0], "--dataset", "rows.jsonl", "--json", "-q")
    (one,) = json.loads(capsys.readouterr().out)
    assert 20 * 3 <= one["calibration"]["n"] <= 20 * 6
    assert one["text"] == "rows.jsonl"


def test_the_built_in_model_is_measured_on_its_own_held_out_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calsmooth("-m", "demo", "--max-tokens", "1000", "--json", "-q")
    (one,) = json.loads(capsys.readouterr().out)
    assert one["calibration"]["accuracy"] > 0.6
    assert one["diversity"]["smallest_singular_value"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--model", "MODEL", "--vocab", "100"), 2, "--vocab"),
        (("--model", "MODEL", "--rho", "0.5"), 2, "--rho"),
        (("--text", "good.txt"), 2, "--text"),
        (("--max-tokens", "5"), 2, "--max-tokens"),
        (("--model", "MODEL", "--text", "none.txt"), 2, "none.txt"),
        (("--model", "MODEL", "--text", "empty.txt"), 1, "empty.txt"),
        (("--model", "MODEL", "--text", "latin.txt"), 1, "latin.txt"),
        (("--model", "MODEL", "--text", "good.txt", "--dataset", "demo"), 2, "--dataset"),
        (("--model", "MODEL", "-o", "full"), 2, "full"),
        (("--model", "nowhere/at/all"), 2, "nowhere/at/all"),
        (("--beta", "0"), 2, "--beta"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(model_folders, tmp_path, monkeypatch, arguments, code, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("the cat eats bread")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("here")
    with pytest.raises(CalsmoothError) as error:
        calsmooth(*(model_folders[0] if a == "MODEL" else a for a in arguments))
    assert error.value.exit_code == code
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_real_model_has_lapacks_singular_values(external_models, tmp_path, monkeypatch, capsys):
    import numpy as np
    import torch

    from calsmooth.models import load_model

    folder = external_models / "smollm2-135m-instruct"
    monkeypatch.chdir(tmp_path)
    calsmooth("-m", folder, "--max-tokens", "100", "--device", "cpu", "--dtype", "float32", "--json", "-q")
    (one,) = json.loads(capsys.readouterr().out)
    weight = load_model(str(folder), dtype=torch.float32).get_output_embeddings().weight.detach().double()
    for rows, key in ((weight, "sigma_c"), (weight - weight.mean(0), "sigma_c_centred")):
        exact = float(np.sqrt(np.linalg.eigvalsh((rows.T @ rows).numpy())[-1]))
        assert one["head"][key] == pytest.approx(exact, rel=1e-5)
    assert one["diversity"]["smallest_singular_value"] is None  # 100 tokens, 576 features
