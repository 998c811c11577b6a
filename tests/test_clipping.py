"""Clipping inside the step is clipping before it: the same weights, the same norm, fewer passes."""

import pytest
import torch

from hf_momentum.integrations.registry import OPTIMIZERS
from hf_momentum.kernels import choice
from hf_momentum.optim import TAM, AdaTAM
from hf_momentum.optim.ahb import ObservesGradients

SIZES = [35, 1, 0, 1000, 20011]
DEVIATION = 1e-6

OPTIONS = {
    "tam": [{}, {"granularity": "tensor"}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "adatam": [{"ema": True, "bias_correction": True}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "adatamw": [{}, {"granularity": "tensor", "maximize": True}],
    "ahb_sgd": [{}, {"granularity": "tensor", "weight_decay": 0.1, "decoupled_weight_decay": False}],
    "ahb_adam": [{}, {"difference": "preconditioned", "weight_decay": 0.1, "decoupled_weight_decay": False}],
    "ahb_adamw": [{"granularity": "tensor"}],
    "critical_sgd": [{"weight_decay": 0.1, "decoupled_weight_decay": False}, {"curvature": "measured"}],
    "critical_adamw": [{}, {"curvature": "measured"}],
    "vradam": [{"beta3": 0.01}, {"norm_scope": "tensor"}, {"norm_of": "update", "beta3": 1e-4}],
    "vrmomentum": [{"beta3": 0.01}, {"norm_scope": "tensor", "weight_decay": 0.1}],
}


def run(name, kwargs, max_norm, inside, steps=20, fused=None, dtype=torch.float32):
    """All weights after some steps, and the norm of each step's gradients; one gradient is missing now and then."""
    generator = torch.Generator().manual_seed(7)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.005}]
    extra = {"max_grad_norm": max_norm} if inside else {}
    optimizer, norms = OPTIMIZERS[name].cls(groups, lr=0.01, fused=fused, **extra, **kwargs), []
    for t in range(steps):
        for i, param in enumerate(params):
            grad = torch.linspace(-1, 1, param.numel()) + 0.3 * torch.randn(param.shape, generator=generator)
            param.grad = None if (t, i) in ((5, 1), (9, 3)) else (grad * (1 + t % 3)).to(dtype)
        before = [None if p.grad is None else p.grad.clone() for p in params]
        if not inside and max_norm is not None:
            if isinstance(optimizer, ObservesGradients):
                optimizer.observe_gradients()
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
        optimizer.step()
        if inside:
            norms.append(optimizer.grad_norm)
            kept = [
                p.grad is old if old is None else torch.equal(p.grad, old)
                for p, old in zip(params, before, strict=True)
            ]
            assert all(kept), "the step must leave p.grad alone"
    return torch.cat([param.detach().float() for param in params]), norms


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


CASES = [(name, kwargs) for name in OPTIONS for kwargs in OPTIONS[name]]


def test_every_optimizer_is_in_the_table():
    assert set(OPTIONS) == set(OPTIMIZERS)


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "foreach"])
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_clipping_inside_is_clipping_first(name, kwargs, fused):
    for max_norm in (0.5, 200.0):  # always active; active in some steps
        inside, norms = run(name, kwargs, max_norm, inside=True, fused=fused)
        before, expected = run(name, kwargs, max_norm, inside=False, fused=fused)
        assert deviation(inside, before) < DEVIATION
        assert torch.allclose(torch.stack(norms).float(), torch.stack(expected), rtol=1e-5)
        assert len({norm > max_norm for norm in map(float, norms)}) == (2 if max_norm > 1 else 1)
    free = run(name, kwargs, None, inside=False, fused=fused)[0]
    assert deviation(free, inside) > 100 * DEVIATION, "the test must see a step that does not clip"


def test_half_precision_gradients_are_not_rounded_again():
    inside = run("tam", {}, 0.5, inside=True, dtype=torch.bfloat16, steps=3)[0]
    first = run("tam", {}, 0.5, inside=False, dtype=torch.bfloat16, steps=3)[0]
    assert deviation(inside, first) < 4e-3, "clip_grad_norm_ rounds what it clips to bfloat16"


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "foreach"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_nan_and_inf_reach_norm_and_weights_as_with_clip_grad_norm_(name, fused):
    for bad in (float("nan"), float("inf")):
        param = torch.nn.Parameter(torch.ones(10))
        optimizer = OPTIMIZERS[name].cls([param], lr=0.1, max_grad_norm=1.0, fused=fused)
        param.grad = torch.ones(10)
        param.grad[3] = bad
        optimizer.step()
        assert not optimizer.grad_norm.isfinite()
        assert not param.isfinite().all()


def test_methods_whose_sums_hold_the_norm_make_no_further_pass(monkeypatch):
    passes = []
    launch = choice._BACKENDS["cpu"].launch

    def counting(kernel, work, width):
        passes.append(kernel)
        return launch(kernel, work, width)

    monkeypatch.setattr(choice._BACKENDS["cpu"], "launch", counting)
    expected = {
        "tam": ["alignment_sums", "momentum_step"],
        "adatamw": ["alignment_sums", "adam_step"],
        "vradam": ["alignment_sums", "adam_step"],
        "ahb_sgd": ["squared_changes", "momentum_step"],
        "ahb_adamw": ["squared_changes", "adam_step"],
        "critical_sgd": ["squared_norms", "momentum_step"],
    }
    for name, kernels in expected.items():
        param = torch.nn.Parameter(torch.ones(10))
        optimizer = OPTIMIZERS[name].cls([param], max_grad_norm=1.0)
        param.grad = torch.ones(10)
        passes.clear()
        optimizer.step()
        assert passes == kernels


def test_max_grad_norm_is_validated():
    param = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"TAM: max_grad_norm must be .* in \(0, inf\), got 0; None does not clip"):
        TAM([param], max_grad_norm=0)
    other = {"params": [torch.nn.Parameter(torch.ones(1))], "max_grad_norm": 2.0}
    with pytest.raises(ValueError, match=r"AdaTAM: max_grad_norm .* the same in all groups; got 2.0 beside 1.0"):
        AdaTAM([{"params": [param], "max_grad_norm": 1.0}, other])


# ---- GradScaler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True], ids=["by the scaler", "by the kernels"])
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_an_overflow_under_a_grad_scaler_changes_nothing(name, kwargs, on_device, monkeypatch):
    """With `_step_supports_amp_scaling`, as on a GPU, the optimizer itself unscales and skips; else the scaler does."""
    cls = OPTIMIZERS[name].cls
    monkeypatch.setattr(cls, "_step_supports_amp_scaling", on_device)
    found = []
    for overflow in (False, True):
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(5000, generator=generator)) for _ in range(2)]
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        optimizer = cls(params, lr=0.01, max_grad_norm=10.0, **kwargs)
        for t in range(5):
            grads = [torch.randn(5000, generator=generator) for _ in params]
            for bad in (True, False) if overflow and t in (0, 3) else (False,):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad * scaler.get_scale()
                if bad:
                    params[1].grad[7] = float("inf")
                scaler.step(optimizer)
                scaler.update()
        found.append(torch.cat([param.detach() for param in params]))
        assert scaler.get_scale() == (2.0 if overflow else 8.0)
    assert found[0].isfinite().all()
    assert deviation(found[1], found[0]) < DEVIATION
