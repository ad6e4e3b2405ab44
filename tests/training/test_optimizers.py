"""Optimizers against their published update rules, and the schedules of the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from promptd.training.optimizers import OPTIMIZERS, OptimizerName, build_optimizer
from promptd.training.schedules import SCHEDULES, ScheduleName, rate_scale

RATE, DECAY, STEPS = 0.1, 0.01, 5


def adamw(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Loshchilov & Hutter 2019, algorithm 2: betas 0.9 and 0.999, epsilon 1e-8, decoupled decay."""
    parameter, mean, square = start.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for step, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        parameter = parameter - RATE * update - RATE * DECAY * parameter
    return parameter


def adafactor(start: torch.Tensor, gradients: list[torch.Tensor], *, scale_parameter: bool = False) -> torch.Tensor:
    """Shazeer & Stern 2018, algorithm 4 with a given rate: no first moment, factored squares, updates clipped at 1."""
    parameter = start.double()
    rows = columns = torch.zeros(()).double()
    for step, gradient in enumerate(gradients, 1):
        beta = 1 - step**-0.8
        squares = gradient.double() ** 2 + 1e-30
        if start.dim() == 1:
            rows = beta * rows + (1 - beta) * squares
            estimate = rows
        else:
            rows = beta * rows + (1 - beta) * squares.sum(-1, keepdim=True)
            columns = beta * columns + (1 - beta) * squares.sum(-2, keepdim=True)
            estimate = rows * columns / rows.sum(-2, keepdim=True)
        update = gradient / estimate.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        size = max(1e-3, parameter.square().mean().sqrt().item()) if scale_parameter else 1.0
        parameter = parameter - RATE * size * update - RATE * DECAY * parameter
    return parameter


REFERENCES: dict[OptimizerName, Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]] = {
    "adamw": adamw,
    "adafactor": adafactor,
}


def trained(name: OptimizerName, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Steps of our optimizer under given gradients."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(name, [{"params": [parameter], "lr": RATE}], DECAY)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().double()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(7,), (4, 6)])
def test_steps_follow_the_published_rule(name: OptimizerName, shape: tuple[int, ...]) -> None:
    """Five steps of vectors and matrices agree with the algorithm written out; the other algorithm does not."""
    draws = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draws)
    gradients = [torch.randn(shape, generator=draws) for _ in range(STEPS)]
    found = trained(name, start, gradients)
    torch.testing.assert_close(found, REFERENCES[name](start, gradients), rtol=1e-4, atol=1e-5)
    for other, reference in REFERENCES.items():
        if other != name:
            assert (found - reference(start, gradients)).abs().max() > 0.01


def test_adafactor_does_not_scale_by_the_parameter() -> None:
    """A step is `lr` whatever the parameter's size, so that rates mean the same under both optimizers."""
    draws = torch.Generator().manual_seed(0)
    start = 100 * torch.randn(4, 6, generator=draws)
    gradients = [torch.randn(4, 6, generator=draws) for _ in range(STEPS)]
    found = trained("adafactor", start, gradients)
    assert (found - adafactor(start, gradients, scale_parameter=True)).abs().max() > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_rise_and_then_follow_the_schedule(schedule: ScheduleName) -> None:
    """All rise linearly during warm-up to the full rate, and never rise again."""
    scales = [rate_scale(schedule, step / 100, 0.1) for step in range(101)]
    assert scales[:11] == pytest.approx([step / 10 for step in range(11)])
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert scales[100] == pytest.approx(1 if schedule == "constant" else 0, abs=1e-12)


def test_the_schedules_differ_where_they_should() -> None:
    """Half of the way down both ramps are at half; a quarter down the cosine is above the line, later below."""
    middle, early, late = 0.55, 0.325, 0.775
    assert rate_scale("linear", middle, 0.1) == pytest.approx(0.5) == pytest.approx(rate_scale("cosine", middle, 0.1))
    assert [rate_scale("linear", done, 0.1) for done in (early, late)] == pytest.approx([0.75, 0.25])
    expected = [(2 + 2**0.5) / 4, (2 - 2**0.5) / 4]
    assert [rate_scale("cosine", done, 0.1) for done in (early, late)] == pytest.approx(expected)
    assert rate_scale("linear", 0.0, 0.0) == rate_scale("cosine", 0.0, 0.0) == 1
