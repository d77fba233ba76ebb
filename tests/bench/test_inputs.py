"""The inputs look like what they say, and the statistics are what numpy says."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from calsmooth.bench.inputs import EPS, Inputs, _check_head, describe, model_inputs, random_inputs
from calsmooth.bench.shapes import PRESETS, Shape
from calsmooth.errors import CalsmoothError, UsageError

CPU = torch.device("cpu")


def make(vocab=4096, hidden=96, tokens=64, kind="model-like", softcap=None, seed=0, dtype=torch.float32):
    shape = Shape("", vocab, hidden, softcap)
    return random_inputs(shape, tokens, kind, dtype=dtype, device=CPU, seed=seed)


def test_model_like_logits_are_peaked_and_untrained_ones_are_flat():
    trained, untrained = describe(make(vocab=32_768)), describe(make(vocab=32_768, kind="randn"))
    # Real small models on real text: top-1 0.43 to 0.47, entropy 2.5 to 2.7 nats, 0.95 of the mass above 2^-12.
    assert 0.25 < trained.top1 < 0.65
    assert 1.5 < trained.entropy < 4.0
    assert 0.9 < trained.mass_above_eps < 1.0
    assert 30 < trained.entries_above_eps < 300
    assert untrained.top1 < 0.01
    assert untrained.entropy > 9.5
    assert untrained.mass_above_eps < 0.2


def test_the_imitated_model_is_calibrated():
    statistics = describe(make(tokens=1000))
    assert statistics.nll == pytest.approx(statistics.entropy, abs=0.25)


def test_statistics_are_those_of_the_whole_softmax():
    inputs = make(vocab=1000, hidden=32, tokens=200, softcap=20.0)
    logits = (inputs.hidden_states @ inputs.lm_head_weight.T).double().numpy()
    log_p = log_softmax(20.0 * np.tanh(logits / 20.0), axis=1)
    p, above = np.exp(log_p), np.exp(log_p) >= EPS
    found = describe(inputs, tokens=150)
    p, log_p, above, y = p[:150], log_p[:150], above[:150], inputs.targets[:150].numpy()
    assert found.tokens == 150
    assert found.top1 == pytest.approx(p.max(1).mean(), rel=1e-5)
    assert found.entropy == pytest.approx(-(p * log_p).sum(1).mean(), rel=1e-5)
    assert found.nll == pytest.approx(-log_p[np.arange(150), y].mean(), rel=1e-5)
    assert found.entries_above_eps == pytest.approx(above.sum(1).mean(), rel=1e-3)
    assert found.mass_above_eps == pytest.approx((p * above).sum(1).mean(), rel=1e-4)
    tiles = [above[i : i + 128, j : j + 256].any() for i in (0, 128) for j in range(0, 1000, 256)]
    assert found.active_tiles == pytest.approx(np.mean(tiles))


def test_the_same_seed_gives_the_same_inputs():
    one, same, other = make(seed=3), make(seed=3), make(seed=4)
    for name in ("hidden_states", "lm_head_weight", "targets"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("kind", ["model-like", "randn"])
@pytest.mark.parametrize(("vocab", "hidden", "tokens"), [(2, 2, 1), (513, 3, 5)])
def test_ragged_sizes(kind, vocab, hidden, tokens):
    inputs = make(vocab, hidden, tokens, kind, dtype=torch.bfloat16)
    assert inputs.sizes == (tokens, vocab, hidden)
    assert inputs.dtype == torch.bfloat16
    assert inputs.targets.min() >= 0
    assert inputs.targets.max() < vocab
    assert describe(inputs).tokens == tokens


def test_presets_are_the_public_models():
    assert PRESETS["gemma-2-2b"].softcap == 30.0
    assert (PRESETS["paper"].vocab, PRESETS["paper"].hidden, PRESETS["paper"].softcap) == (256_000, 2304, None)


def tiny_model(tmp_path, softcap=None):
    """A two-layer Gemma 2 (it has a softcap) and a tokenizer of words, saved as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(60)} | {"<unk>": 60, "<eos>": 61}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=62, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, final_logit_softcapping=softcap,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("softcap", [None, 0.05])
def test_a_models_own_hidden_states_give_its_own_loss(tmp_path, softcap):
    from transformers import AutoModelForCausalLM

    from calsmooth.bench.methods import METHODS

    folder, text = tiny_model(tmp_path / "m", softcap), tmp_path / "t.txt"
    words = np.random.default_rng(0).integers(0, 60, 100)
    text.write_text(" ".join(f"w{i}" for i in words))
    inputs = model_inputs(folder, text, 70, dtype=torch.float32, device=CPU)
    assert inputs.sizes == (70, 62, 16)
    assert inputs.softcap == softcap
    # Windows of 32 tokens, of which 31 have a next one: 31 + 31 + 8.
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for start in (0, 32, 64):
        ids = torch.tensor(words[start : start + 32])
        logits = model(input_ids=ids[None]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").tolist()
    eager = next(m for m in METHODS if m.name == "eager").build(0.0, inputs.softcap)
    found = eager(inputs.hidden_states, inputs.lm_head_weight, inputs.targets)
    assert float(found) == pytest.approx(np.mean(losses[:70]), rel=1e-5)


def test_a_text_that_is_too_short_says_how_many_tokens_it_gives(tmp_path):
    folder, text = tiny_model(tmp_path / "m"), tmp_path / "t.txt"
    text.write_text("w1 w2 w3 w4")
    with pytest.raises(UsageError, match=r"gives 3 tokens .* asks for 50"):
        model_inputs(folder, text, 50, dtype=torch.float32, device=CPU)


def test_an_architecture_that_does_more_to_its_logits_is_refused():
    logits = torch.randn(4, 10)
    _check_head("m", logits, logits * 1.001)
    with pytest.raises(CalsmoothError, match="can't rebuild"):
        _check_head("m", logits, logits * 1.2)
    with pytest.raises(CalsmoothError, match="can't rebuild"):
        _check_head("m", logits, logits * float("nan"))


def test_inputs_know_their_sizes():
    inputs = Inputs(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3).long(), None, "x")
    assert inputs.sizes == (3, 5, 2)
