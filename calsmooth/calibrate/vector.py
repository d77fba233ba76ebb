"""Vector scaling (Guo et al. 2017): a scale and a bias for each choice's place, logit_k -> scale_k logit_k + bias_k.

It mends what no temperature can, such as a model that prefers to answer "A". It means something only where places
do: letters, not the endings of a cloze question.
"""

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.calibrate.fit import Fit
from calsmooth.calibrate.temperature import fit_temperature
from calsmooth.errors import CalsmoothError
from calsmooth.metrics import Array, log_softmax

PULL = 1e-3
"""Weight of the pull towards the plain temperature, in nats over the whole sample for a distance of 1."""


def fit_vector(logits: ArrayLike, labels: ArrayLike) -> Fit:
    """argmin of the negative log-likelihood over scales and biases, a convex problem solved with its exact Hessian.

    logits: (N, K) log-probabilities over the choices; -inf where a question lacks a choice. labels: (N,).
    The fit starts from the best temperature and is held near it by a pull too weak to be seen but where the data leave
    the parameters open (a choice that is never right, separable data).

    Raises:
        ValueError: as `fit_temperature`.
        CalsmoothError: SciPy isn't installed.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise CalsmoothError(
            "--method vector: needs SciPy; run pip install 'calsmooth[calibrate]', or use --method temperature"
        ) from None
    z, k = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    start = fit_temperature(z, k)
    # In units of the temperature, so that the start is scale 1, bias 0.
    temperature = 1.0 if start.note else start.temperature
    u = np.where(np.isfinite(z), z, 0.0) / temperature
    missing = np.where(np.isfinite(z), 0.0, -np.inf)
    right = np.eye(z.shape[1])[k]
    home = np.concatenate([np.ones(z.shape[1]), np.zeros(z.shape[1])])

    def probabilities(x: Array) -> Array:
        scale, bias = np.split(x, 2)
        return log_softmax(scale * u + bias + missing)

    def loss(x: Array) -> tuple[float, Array]:
        lp = probabilities(x)
        away = np.exp(lp) - right
        gradient = np.concatenate([(away * u).mean(axis=0), away.mean(axis=0)]) + PULL / len(k) * (x - home)
        return -lp[np.arange(len(k)), k].mean() + PULL / len(k) / 2 * float((x - home) @ (x - home)), gradient

    def hessian(x: Array) -> Array:
        p = np.exp(probabilities(x))
        features = np.concatenate([p * u, p], axis=1)
        blocks = [[np.diag((p * a * b).mean(axis=0)) for b in (u, 1.0)] for a in (u, 1.0)]
        return np.block(blocks) - features.T @ features / len(k) + PULL / len(k) * np.eye(len(x))

    found = minimize(loss, home, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-10})
    scale, bias = np.split(np.asarray(found.x, dtype=np.float64), 2)
    return vector_fit(scale / temperature, bias)


def vector_fit(scale: Array, bias: Array) -> Fit:
    """The recalibration with these scales and biases, (K,) each."""

    def apply(logprobs: Array) -> Array:
        present = np.isfinite(logprobs)
        moved = scale * np.where(present, logprobs, 0.0) + bias
        return log_softmax(np.where(present, moved, -np.inf))

    return Fit(apply, {"scale": scale.tolist(), "bias": bias.tolist()})
