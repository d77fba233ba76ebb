"""What is measured of a head against the model's own logits, whatever its architecture."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from calsmooth.data import Example
from calsmooth.entropy_bound import measure as measure_module
from calsmooth.entropy_bound.advice import Calibration, advise, calibration
from calsmooth.entropy_bound.bound import entropy_bound
from calsmooth.entropy_bound.frontier import smoothing_entropy
from calsmooth.entropy_bound.measure import Measurement, Peaks, Reach, Tokens, measure
from calsmooth.entropy_bound.plot_models import plot_models, prepare_panel
from calsmooth.entropy_bound.run_models import report
from calsmooth.entropy_bound.spectrum import SingularValue
from calsmooth.entropy_bound.texts import take_tokens, text_examples
from calsmooth.metrics import expected_calibration_error

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {
        "final_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 8, "head_dim": 8,
    },
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # a head with a bias
}  # fmt: skip


def make(name: str, strength: float) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=strength).add_(strength)  # with a mean for centring to take off
        if head.bias is not None:
            head.bias.normal_(std=strength)
    return model


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    """Of different lengths, with labels on the second halves."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(4, 40, size=count).tolist():
        ids = rng.integers(3, 97, size=length).tolist()
        made.append(Example(ids, [-100] * (length // 2) + ids[length // 2 :]))
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("strength", [0.02, 0.6])
def test_measurements_are_those_of_the_models_own_logits_and_above_every_floor(name, strength, monkeypatch):
    monkeypatch.setitem(measure_module.BATCH_TOKENS, "cpu", 64)
    model = make(name, strength)
    data = examples()
    with torch.no_grad():
        own, targets = [], []
        for e in data:
            logits = model(torch.tensor([e.input_ids]), use_cache=False).logits[0, :-1].double()
            wanted = [i for i, label in enumerate(e.labels[1:]) if label != -100]
            own.append(logits[wanted])
            targets += [e.labels[i + 1] for i in wanted]
        log_p = torch.cat(own).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).numpy()
    top, predicted = log_p.max(-1)

    m = measure(model, data)
    assert m.tokens.entropy == pytest.approx(entropy, abs=1e-5)
    assert m.tokens.confidence == pytest.approx(top.exp().numpy(), rel=1e-4)
    assert m.tokens.correct.tolist() == (predicted == torch.tensor(targets)).double().tolist()
    assert m.tokens.nll == pytest.approx(-log_p[range(len(targets)), targets].numpy(), rel=1e-4)

    weight = model.get_output_embeddings().weight.detach().double().numpy()
    assert m.reach.sigma_c.value == pytest.approx(np.linalg.norm(weight, 2), rel=1e-5)
    assert m.reach.sigma_c_centred.value == pytest.approx(np.linalg.norm(weight - weight.mean(0), 2), rel=1e-5)
    # Longest logits: |z| <= scale (sigma_C ||h|| + |bias|), and less behind a softcap.
    lengths = np.linalg.norm(torch.cat(own).numpy(), axis=1)
    assert np.all(lengths <= m.reach.radius(m.tokens.norm) * (1 + 1e-5))
    sqrt_d = math.sqrt(m.reach.hidden)
    assert np.all(m.tokens.norm <= sqrt_d * m.tokens.largest * (1 + 1e-6))
    for centred in (False, True):
        own_floor = m.reach.floor(m.tokens.norm, centred=centred)
        assert np.all(entropy >= own_floor - 1e-9)
        assert np.all(own_floor >= m.reach.floor(sqrt_d * m.tokens.largest.max(), centred=centred) - 1e-12)
        assert np.all(m.peaks.entropy >= m.reach.floor(np.median(m.tokens.norm), centred=centred) - 1e-6)
    if strength < 0.1:  # these floors say something
        assert np.all(m.reach.floor(m.tokens.norm, centred=True) > 0.5 * math.log(97))
    assert m.diversity.tokens == len(targets)
    assert m.reach.scale == pytest.approx(0.25 if name == "Granite" else 1.0)
    assert (m.reach.softcap is None) == (name != "Gemma2")
    assert (m.reach.bias_norm > 0) == (name == "Phi")


def test_peaks_are_what_the_head_gives_along_its_rows():
    model = make("Llama", 0.6)
    m = measure(model, examples())
    weight = model.get_output_embeddings().weight.detach().double()
    rows = weight - weight.mean(0)
    h = rows / rows.norm(dim=1, keepdim=True) * float(np.median(m.tokens.norm))
    p = (h @ weight.T).softmax(-1)
    assert m.peaks.token.tolist() == list(range(97))
    assert m.peaks.probability == pytest.approx(p.diagonal().numpy(), rel=1e-4)
    assert np.all(m.peaks.entropy >= 0)


def made_up(confidence, correct, *, sigma=500.0, peaks=0.999) -> Measurement:
    n = len(confidence)
    value = SingularValue(sigma, 0.0, 1)
    reach = Reach(1000, 64, value, value, 0.0, 0.0, 1.0, None)
    entropy = -np.log(np.clip(confidence, 1e-9, 1))
    one = np.ones(n)
    tokens = Tokens(entropy, np.asarray(confidence), np.asarray(correct, float), entropy, one, one / 8)
    found = Peaks(np.arange(3), np.full(3, peaks), np.full(3, 0.01))
    return Measurement(reach, tokens, found, measure(make("Llama", 0.1), examples()).diversity)


@pytest.fixture(scope="module")
def over_confident() -> Measurement:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 4000)
    return made_up(confidence, rng.random(4000) < confidence - 0.2)


def test_the_parts_of_the_calibration_error_add_up(over_confident):
    c = calibration(over_confident)
    assert c.over + c.under == pytest.approx(c.ece)
    assert c.ece == pytest.approx(
        expected_calibration_error(over_confident.tokens.confidence, over_confident.tokens.correct)
    )
    assert c.over - c.under == pytest.approx(c.confidence - c.accuracy)


def test_advice_for_an_over_confident_head(over_confident):
    c = calibration(over_confident)
    advice = advise(over_confident, 0.1, c)
    assert "is on this text" in advice.verdict
    assert advice.addressable == c.over
    assert advice.excess == pytest.approx(float(smoothing_entropy(1000, 0.1)), rel=1e-6)
    assert advice.above == pytest.approx((over_confident.tokens.confidence > 0.9001).mean(), abs=0.01)
    assert advice.frontier < 1e-100


def test_advice_for_a_calibrated_and_for_an_under_confident_head():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 0.95, 4000)
    for right in (confidence, np.minimum(confidence + 0.2, 1)):
        m = made_up(confidence, rng.random(4000) < right)
        assert "isn't on this text" in advise(m, 0.1, calibration(m)).verdict


def test_advice_for_a_head_that_cannot_be_over_confident():
    """With logits no longer than 5 no token of 1,000 reaches what beta = 0.1 asks for."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.001, 0.1, 2000)
    m = made_up(confidence, rng.random(2000) < confidence / 2, sigma=5.0, peaks=0.1)
    advice = advise(m, 0.1, calibration(m))
    assert advice.verdict.startswith("The head can't be over-confident")
    assert advice.addressable == 0
    assert advice.excess < 0
    assert 0.1 < advice.frontier < 1


def test_the_report_holds_the_theorem_and_how_loose_it_is(over_confident):
    c = calibration(over_confident)
    r = report(over_confident, c, (0.05, 0.1))
    assert r["rho"] == pytest.approx(500 / 8)
    assert r["entropy_lower_bound"] == pytest.approx(float(entropy_bound(1000, 64, 500 / 8)))
    assert r["entropy_lower_bound_log10"] == pytest.approx(math.log10(r["entropy_lower_bound"]), rel=1e-9)
    assert r["looseness"]["text_minimum"] == pytest.approx(r["entropy"]["min"])
    assert r["attained"]["entropy"] == 0.01
    assert [s["beta"] for s in r["smoothing"]] == [0.05, 0.1]


def test_the_picture_holds_the_measurements(over_confident):
    c: Calibration = calibration(over_confident)
    panel = prepare_panel("made up", over_confident, c, (0.1,), 15)
    assert np.all(np.diff(panel.entropies) >= 0)
    assert panel.floor == pytest.approx(report(over_confident, c, (0.1,))["entropy_lower_bound_log10"])
    assert panel.norms[next(iter(panel.norms))] == pytest.approx(500.0)
    weak = made_up(np.full(50, 0.01), np.zeros(50), sigma=5.0, peaks=0.0)  # a floor inside the picture
    figure = plot_models([("one", over_confident, c), ("two", weak, calibration(weak))], (0.1, 0.2), 15)
    assert len(figure.axes) == 4


def test_texts_become_stretches_that_begin_as_the_tokenizer_does(tokenizer):
    text = "the red cat eats bread and the big dog sees a small bird " * 5
    made = text_examples(text, tokenizer, max_length=16)
    assert all(e.input_ids[0] == tokenizer.bos_token_id and len(e.input_ids) <= 16 for e in made)
    assert [token for e in made for token in e.input_ids[1:]] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(e.labels == [-100, *e.input_ids[1:]] for e in made)
    taken = take_tokens(made, 20)
    assert sum(e.target_tokens for e in taken) == 20
    assert taken[0] == made[0]
    assert taken[1].input_ids == made[1].input_ids[:6]
    assert take_tokens(made, 10**6) == made
