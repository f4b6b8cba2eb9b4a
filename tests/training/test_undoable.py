"""Steps that are undone on the device, against optimizers that are not run at all."""

import copy
import importlib

import pytest
import torch
from torch import nn

from matryoshka.training.muon import MuonRules
from matryoshka.training.optim import make_optimizer, parameter_groups
from matryoshka.training.undoable import flat_view, undoable_step

CPU = torch.device("cpu")
CASES = {
    "lars": {},
    "muon": {},
    "muon with sgd": {"muon": MuonRules(rest="sgd")},
    "muon of filters": {"muon": MuonRules(rest="sgd", scale="filters")},
}


def net():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)
    )
    return layers.to(memory_format=torch.channels_last)


def optimizer_of(model, name, options, monkeypatch):
    groups = parameter_groups(model, 0.1, 0.0)
    made = make_optimizer(name.split()[0], groups, 0.1, 0.9, CPU, **options)
    assert made.undoable
    if name == "muon":  # as on a GPU, where AdamW's counters are tensors of the device
        module = importlib.import_module("timm.optim.adamw")
        monkeypatch.setattr(module, "_check_capturable_devices", lambda *_: None)
        for group in made.param_groups:
            group["capturable"] = True
    return made


def state_of(model, optimizer):
    found = {f"weight {name}": value for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                found[f"{key} {name}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("skips", [(0, 0, 1, 0), (1, 0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_an_undone_step_never_was(name, skips, monkeypatch):
    """Also the first one, which makes the optimizer's state. The reference leaves it out."""
    model = net()
    reference = copy.deepcopy(model)
    optimizer = optimizer_of(model, name, CASES[name], monkeypatch)
    expected = optimizer_of(reference, name, CASES[name], monkeypatch)
    for number, skip in enumerate(skips):
        torch.manual_seed(number)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = torch.full_like(p, float("nan")) if skip else q.grad.clone()
        undoable_step(optimizer, torch.tensor(bool(skip)))
        if not skip:
            expected.step()
        want = state_of(reference, expected)
        for key, value in state_of(model, optimizer).items():
            zero = torch.zeros_like(value)  # state that only the undone step has made
            assert torch.equal(value, want.get(key, zero)), f"step {number}: {key}"


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_flat_view_is_the_memory_in_its_order(shape, layout):
    x = torch.rand(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    flat = flat_view(x)
    assert flat.shape == (x.numel(),)
    assert flat.data_ptr() == x.data_ptr()
    flat.zero_()
    assert not x.any()
