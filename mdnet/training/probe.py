"""Linear probing before training: the streams' heads begin as the ridge regression of the ratings on their tokens.

With few rated pictures, gradient steps overfit Vim before the heads have found what its start already knows. Fitting
the heads first and training everything after is LP-FT (Kumar et al., arXiv 2202.10054); docs/real-faces.md has figures.

A ridge on all tokens is a matrix of weights for each stream, places by channels. `StreamHead` sums tokens over places
with `stream_heads` sets of weights: those are the matrix's first singular vectors. Of its MLP two units are enough,
since gelu(x) - gelu(-x) = x; the others begin at weight 0, as does the class token's logit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdnet.model.fusion import StreamHead
from mdnet.model.net import MDNet
from mdnet_engines.errors import UsageError

if TYPE_CHECKING:
    from mdnet.training.features import Features

_ROWS, _BYTES = 2**15, 2**31
"""Most views that the regression is fitted to, and most memory for their tokens."""
_PENALTIES = torch.logspace(-1, 3, 9)
"""Tried on a quarter of the images; in units of the mean square of a view's tokens."""
_EDGE = 0.02
"""A rating at the end of the scale has no logit: it counts as this share of the scale from the end."""


@torch.no_grad()
def fit_stream_heads(model: MDNet, features: Features, images: Tensor, *, views: int, seed: int) -> float:
    """Fit the heads of `model`'s streams to the ratings of `images` (n,), rows of `features`.

    Returns:
        The mean squared error of the views that it was fitted to, on the rating scale.

    Raises:
        UsageError: the model's streams have no heads.
    """
    heads = _heads(model)
    if not heads:
        raise UsageError("--linear-probe fits the heads of the streams, and this model has none (stream_heads is 0)")
    model.eval()
    sizes = {name: head.maps.in_features * model.config.vim_dim for name, head in heads.items()}
    count = max(2, min(_ROWS, _BYTES // (4 * sum(sizes.values()))))
    image, rows, mirror = _chosen(images, len(features), views, count, torch.Generator().manual_seed(seed))
    tokens, ratings = _tokens(model, features, rows, mirror)
    scale = model.fusion.head.on_scale
    share = ((ratings - scale.low) / (scale.high - scale.low)).clamp(_EDGE, 1 - _EDGE)
    weights, level = _ridge(tokens, torch.logit(share), held_out=image % 4 == 0)
    centre = tokens.mean(dim=0)
    spread, parts = float(((tokens - centre) @ weights).std()), [*sizes.values()]
    kept = [
        _write(head, part, middle, spread)
        for head, part, middle in zip(heads.values(), weights.split(parts), centre.split(parts), strict=True)
    ]
    predicted = level + (tokens - centre) @ torch.cat(kept)
    model.fusion.head.out.weight.zero_()
    model.fusion.head.out.bias.fill_(level)
    return float((scale(predicted) - ratings).square().mean())


def _heads(model: MDNet) -> dict[str, StreamHead]:
    return {name: head for name, head in model.fusion.stream_heads.items() if isinstance(head, StreamHead)}


def _chosen(
    images: Tensor, stride: int, views: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `count` views, as many of each image: the image's number, its row in the features, 1 where mirrored."""
    order = torch.randperm(len(images), generator=generator)[:count]
    each = max(1, min(2 * views, count // len(order)))
    kinds = torch.rand(len(order), 2 * views, generator=generator).argsort(dim=1)[:, :each].flatten()
    image = order.repeat_interleave(each)
    return image, images[image] + stride * (kinds // 2), kinds % 2


def _tokens(model: MDNet, features: Features, rows: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """All streams' normalised tokens side by side (rows, d), and the ratings (rows,), on the CPU."""
    device, tokens, ratings = next(model.parameters()).device, [], []
    for chosen, mirrored in zip(rows.split(64), mirror.split(64), strict=True):
        maps, pixels, rated = features.batch(chosen, mirrored, device)
        streams = model.fusion.streams(maps, model.vim(pixels))
        parts = [head.norm(streams[name]).flatten(1) for name, head in _heads(model).items()]
        tokens.append(torch.cat(parts, dim=1).float().cpu())
        ratings.append(rated.cpu())
    return torch.cat(tokens), torch.cat(ratings)


def _ridge(x: Tensor, y: Tensor, *, held_out: Tensor) -> tuple[Tensor, float]:
    """Weights (d,) for centred x (n, d), and the mean of y (n,). The penalty is the best one on the rows `held_out`."""
    centre, level = x.mean(dim=0), y.mean()
    x, y = x - centre, y - level
    unit = float(x.square().sum(dim=1).mean())
    dual = len(x) < x.shape[1]

    def fit(rows: Tensor, penalty: float, gram: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(gram + penalty * unit * torch.eye(len(gram)))
        side = y[rows] if dual else x[rows].T @ y[rows]
        solved = torch.cholesky_solve(side[:, None], factor)[:, 0]
        return x[rows].T @ solved if dual else solved

    def gram(rows: Tensor) -> Tensor:
        return x[rows] @ x[rows].T if dual else x[rows].T @ x[rows]

    fitted = gram(~held_out)
    errors = [(x[held_out] @ fit(~held_out, float(p), fitted) - y[held_out]).square().mean() for p in _PENALTIES]
    best = _PENALTIES[int(torch.stack(errors).argmin())]
    everything = torch.ones_like(held_out)
    return fit(everything, float(best), gram(everything)), float(level)


def _write(head: StreamHead, weights: Tensor, centre: Tensor, spread: float) -> Tensor:
    """Make `head` give weights @ (tokens - centre), as far as its number of maps allows; return what it has of them."""
    maps, hidden, out = head.maps, head.hidden, head.out
    left, values, right = torch.linalg.svd(weights.unflatten(0, (maps.in_features, -1)), full_matrices=False)
    kept = min(len(maps.weight), len(values))
    left, read = left[:, :kept], (values[:kept, None] * right[:kept]).mT  # (places, kept), (dim, kept)
    # The sums are as wide as those that a fresh head makes; what reads them makes up for it.
    wide = maps.weight.norm(dim=1).mean()
    maps.weight[:kept] = left.mT * wide
    line = torch.zeros(len(read), len(maps.weight))
    line[:, :kept] = read / wide
    line = line.flatten().to(hidden.weight) / spread
    hidden.weight[0], hidden.weight[1] = line, -line
    hidden.bias[:2] = 0
    out.weight.zero_()
    out.weight[0, 0], out.weight[0, 1] = spread, -spread
    kept_weights = (left @ read.mT).flatten()
    out.bias.fill_(-float(kept_weights @ centre))
    return kept_weights
