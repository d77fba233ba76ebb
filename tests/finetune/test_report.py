"""The loss curve: what is drawn, without training."""

from pathlib import Path

import numpy as np
import pytest

from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.report import plot_loss_curve, prepare_loss_curve
from calsmooth.finetune.results import curve_title


def lines(losses, lr=2e-5):
    return [{"step": step, "loss": loss, "lr": lr} for step, loss in enumerate(losses, 1)]


def test_the_mean_does_not_lag_behind():
    falling = np.linspace(3.0, 1.0, 200)
    curve = prepare_loss_curve(lines(falling))
    assert curve.window == 11
    assert curve.smooth == pytest.approx(falling, abs=1e-12)  # of a straight line, the line itself, ends included
    spike = prepare_loss_curve(lines([0.0] * 100 + [1.0] + [0.0] * 100))
    raised = np.flatnonzero(spike.smooth)
    assert raised.mean() == 100
    assert sum(spike.smooth) == pytest.approx(1.0)


def test_few_steps_are_their_own_mean():
    assert prepare_loss_curve(lines([3.0, 2.0])).smooth == [3.0, 2.0]
    assert prepare_loss_curve([]).smooth == []
    plot_loss_curve(prepare_loss_curve([]), "nothing")


def test_the_rate_has_no_offset_and_both_panels_the_same_steps():
    held_out = [{"step": step, "eval_nll": 1.0, "eval_ece": 0.1} for step in (0, 40, 80)]
    figure = plot_loss_curve(prepare_loss_curve([*lines(np.ones(80)), *held_out]), "t")
    figure.draw_without_rendering()
    loss, below, rate, error = figure.axes
    assert rate.yaxis.get_offset_text().get_text() == ""
    assert "2e-05" in [label.get_text() for label in rate.get_yticklabels()]
    assert loss.get_xlim() == below.get_xlim()
    colors = [line.get_color() for ax in (loss, rate, below, error) for line in ax.get_lines()]
    assert len(set(colors)) == 4  # both lines of the loss share one


def test_the_title_says_what_was_trained(tmp_path: Path):
    summary = {"steps": 105, "tokens": 102_410}
    config = FinetuneConfig(model="org/x-1B", dataset=("data/alpaca.json",), beta=0.1)
    assert curve_title(config, summary) == (
        "x-1B fine-tuned on alpaca.json, label smoothing beta = 0.1\n105 steps, 102,410 target tokens"
    )
    assert curve_title(FinetuneConfig(), summary).startswith("the built-in model fine-tuned on the built-in data")
