"""Controls: plain classifiers of ID against auxiliary OOD images, given what the decoder is given.

If one of them is as good as the heatmap, the heatmap adds nothing to detection.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ood_heatmap.devices import at_most_threads

_Float32: TypeAlias = NDArray[np.float32]
_Classes: TypeAlias = NDArray[np.integer[Any]]

_WIDTH, _BATCH_SIZE, _LR = 256, 256, 1e-3
# as few epochs as give this many steps, within these bounds
_STEPS, _EPOCHS = 1500, (5, 30)
_INPUTS_PER_THREAD = 512


def logistic_regression(
    id_features: _Float32, ood_features: _Float32
) -> Callable[[_Float32], _Float32]:
    """Fit a linear classifier of ID against auxiliary OOD features; the score is its log-odds.

    Args:
        id_features: ``(N, D)``.
        ood_features: ``(M, D)``.
    """
    # here: it takes most of a second, and only fitting needs it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    both = np.concatenate([id_features, ood_features])
    is_ood = np.repeat([0, 1], [len(id_features), len(ood_features)])
    with warnings.catch_warnings():
        # the limited number of steps is intended
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(both, is_ood)
    return partial(_decide, model)


def _decide(model: Any, features: _Float32) -> _Float32:
    """Return the log-odds of a linear classifier of scikit-learn."""
    return np.asarray(model.decision_function(features), np.float32)


def mlp(
    inputs: tuple[_Float32, _Classes],
    ood_inputs: tuple[_Float32, _Classes],
    num_classes: int,
    *,
    noise: float,
    seed: int,
) -> Callable[[_Float32, _Classes], _Float32]:
    """Fit an MLP of ID against auxiliary OOD images; the score is its log-odds.

    As the decoder, it gets noise on its inputs in training, after they are scaled to mean 0 and
    standard deviation 1 on ID images, and the predicted class as one-hot vector. Binary
    cross-entropy, in which all ID images weigh as much as all OOD images.

    Args:
        inputs: ``(N, K)`` inputs and ``(N,)`` predicted classes of ID images.
        ood_inputs: ``(M, K)`` and ``(M,)`` of auxiliary OOD images.
        num_classes: Number of classes of the classifier.
        noise: Standard deviation of the noise.
        seed: Random seed of weights, order of images and noise.

    Returns:
        A function of ``(B, K)`` inputs and ``(B,)`` predicted classes that returns ``(B,)``.
    """
    mean, std = (getattr(inputs[0], name)(axis=0, dtype=np.float64) for name in ("mean", "std"))
    scale = mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
    both, classes = (
        torch.from_numpy(np.concatenate(pair)) for pair in zip(inputs, ood_inputs, strict=True)
    )
    both.sub_(torch.from_numpy(scale[0])).div_(torch.from_numpy(scale[1]))
    counts = torch.tensor([len(inputs[0]), len(ood_inputs[0])])
    is_ood = torch.repeat_interleave(torch.tensor([0.0, 1.0]), counts)
    weight = torch.repeat_interleave(len(both) / (2 * counts), counts)
    # products are small: more threads would mostly wait for each other
    with at_most_threads(1 + both.shape[1] // _INPUTS_PER_THREAD), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = _Network(both.shape[1], num_classes)
        _train(network, both, classes.long(), is_ood, weight, noise)
    weights = [item.detach().numpy() for item in network.parameters()]
    return partial(_log_odds, scale, weights)


class _Network(nn.Module):
    """Two hidden layers; the first adds a vector for the class, as if it were one-hot."""

    def __init__(self, num_inputs: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, _WIDTH)
        self.of_class = nn.Embedding(num_classes, _WIDTH)
        self.second, self.last = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, 1)
        nn.init.zeros_(self.of_class.weight)

    def forward(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Return log-odds ``(B,)`` of scaled inputs ``(B, K)`` and classes ``(B,)``."""
        hidden = functional.relu(self.first(inputs) + self.of_class(classes))
        odds: Tensor = self.last(functional.relu(self.second(hidden)))
        return odds[:, 0]


def _train(
    network: _Network, inputs: Tensor, classes: Tensor, is_ood: Tensor, weight: Tensor, noise: float
) -> None:
    """Train with Adam and a cosine schedule; the global random state decides order and noise."""
    per_epoch = -(-len(inputs) // _BATCH_SIZE)
    num_steps = per_epoch * int(np.clip(-(-_STEPS // per_epoch), *_EPOCHS))
    optimizer = torch.optim.Adam(network.parameters(), _LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(inputs))
        start = step % per_epoch * _BATCH_SIZE
        rows = order[start : start + _BATCH_SIZE]
        batch = inputs[rows]
        odds = network(batch + noise * torch.randn_like(batch), classes[rows])
        loss = functional.binary_cross_entropy_with_logits(odds, is_ood[rows], weight[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _log_odds(
    scale: tuple[_Float32, _Float32],
    weights: Sequence[_Float32],
    inputs: _Float32,
    classes: _Classes,
) -> _Float32:
    """Return the log-odds of the fitted network, ``(B,)``.

    Args:
        scale: Mean and standard deviation of the inputs, ``(K,)`` each.
        weights: Parameters of ``_Network``.
        inputs: ``(B, K)``.
        classes: ``(B,)``.
    """
    first, first_bias, of_class, second, second_bias, last, last_bias = weights
    hidden = (inputs - scale[0]) / scale[1] @ first.T + first_bias + of_class[classes]
    hidden = np.maximum(hidden, 0) @ second.T + second_bias
    return np.asarray(np.maximum(hidden, 0) @ last[0] + last_bias, np.float32)
