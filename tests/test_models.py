"""Which folder or hub id a --model value means, and what is refused."""

from pathlib import Path

import pytest

from calsmooth import models
from calsmooth.errors import CalsmoothError, UsageError


def test_the_built_in_model_is_a_folder_of_the_package() -> None:
    assert (Path(models.resolve_model("demo")) / "config.json").is_file()


def test_a_hub_id_passes() -> None:
    assert models.resolve_model("org/some-model.v1") == "org/some-model.v1"


@pytest.mark.parametrize("name", ["./none", "../none", "a/b/c", "~/none-such", "", "-x"])
def test_a_path_without_a_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--model"):
        models.resolve_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        models.resolve_model(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        models.resolve_model(str(tmp_path / "file"))


def test_a_broken_folder_is_one_line(tmp_path: Path) -> None:
    import torch

    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(CalsmoothError, match="can't be loaded") as error:
        models.load_model(str(tmp_path), dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_labels_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.model_label("org/model") == "model"
    assert models.model_label("my-model/") == "my-model"
    assert models.model_label(str(tmp_path / "my-model")) == "my-model"


def test_a_folder_called_model_goes_by_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetune-x-beta0.1" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "finetune-x-beta0.1")
    for name in ("model", "./model", str(tmp_path / "finetune-x-beta0.1" / "model")):
        assert models.model_label(name) == "finetune-x-beta0.1"
    assert models.model_label("/gone/finetune-y/model") == "finetune-y"  # of a run on another machine
    assert models.model_label("org/model") == "model"


def test_a_fine_tuned_model_says_what_it_was_made_of(tmp_path: Path) -> None:
    folder = tmp_path / "finetune-x" / "model"
    folder.mkdir(parents=True)
    assert models.model_description(str(folder)) == str(folder)
    (folder.parent / "config.yaml").write_text("model: org/x\ndataset: [a.json, b.json=0.5]\nbeta: 0.1\n")
    assert models.model_description(str(folder)) == (
        "finetune-x: org/x fine-tuned on a.json, b.json=0.5 with label smoothing beta = 0.1"
    )
    (folder.parent / "config.yaml").write_text("[1, 2]")
    assert models.model_description(str(folder)) == str(folder)
    assert models.model_description("org/x") == "org/x"


def test_devices_and_dtypes() -> None:
    import torch

    assert models.pick_device("cpu") == torch.device("cpu")
    assert models.pick_dtype(None, torch.device("cpu")) == torch.float32
    assert models.pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UsageError, match="no such device"):
        models.pick_device("gpu")
    with pytest.raises(UsageError, match="not available here"):
        models.pick_device("cuda:99")


def test_tokens_without_an_embedding_are_refused() -> None:
    config = models.load_config("demo")
    models.check_vocabulary("demo", config, config.vocab_size - 1)
    with pytest.raises(CalsmoothError, match=f"--model demo: its tokenizer gives token {config.vocab_size} and"):
        models.check_vocabulary("demo", config, config.vocab_size)
