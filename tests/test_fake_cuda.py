"""Training steps on a GPU that no machine needs to have: waits, copies, launches, graphs."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, FakeSslStep, FakeStep, fake_cuda
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from matryoshka import nested
from matryoshka.models import ModelSpec, build
from matryoshka.nested import nested_cross_entropy
from matryoshka.ssl.options import METHODS
from matryoshka.training import compiling
from matryoshka.training.compiling import compile_step, part_sizes
from matryoshka.training.options import OPTIMIZERS
from matryoshka.training.supervised_step import Objective

MIXING = {"random_erasing": 0.3, "mixup": 0.2, "cutmix": 1.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_for_the_gpu(monkeypatch, optimizer, precision):
    """For every optimizer and precision, with and without the average and mixed images."""
    with fake_cuda(monkeypatch):
        for ema, data in ((True, MIXING), (False, {})):
            step = FakeStep(monkeypatch, optimizer, precision=precision, ema=ema, data=data)
            if optimizer == "adan":  # counts its steps on the host; no other optimizer waits
                with pytest.raises(DataDependentOutputException):
                    step()
                continue
            step()  # constants of the run are copied once
            launches = step()
            assert launches.waits == []
            assert launches.to_host == 1, "loss, norm and streak of skipped steps: one copy"


@pytest.mark.parametrize("method", METHODS)
def test_no_step_without_labels_waits_for_the_gpu(monkeypatch, method):
    """Views with every augmentation, both towers, the queue, the probe."""
    with fake_cuda(monkeypatch):
        step = FakeSslStep(monkeypatch, method=method)
        step()
        launches = step()
    assert launches.waits == []
    assert launches.to_host == 1


def test_launches_of_a_step_are_few_beside_the_network(monkeypatch):
    """Those of ResNet-18 that are neither its forward nor its backward pass, with SGD."""
    with fake_cuda(monkeypatch):
        step = FakeStep(monkeypatch, "sgd", ema=True, arch="resnet18", dims=(8, 32, 512), size=64)
        step()
        whole = step().launched
        step.guard.reset()  # its reports cannot be read
        step.objective.forward = _nothing
        outside = step().launched
    # 40, as with ResNet-50: no work for each parameter or buffer.
    assert outside <= 45
    assert whole - outside <= 140, "the forward pass: 129"


def _nothing(images, *_, **__):
    return torch.zeros((), device=CUDA), torch.zeros(3, device=CUDA)


# ---------------------------------------------------------------- compiled graphs


def graphs_of(spec: ModelSpec, precision: str) -> list[torch.fx.GraphModule]:
    """What torch.compile makes of an objective, in a `fake_cuda` block."""
    torch._dynamo.reset()
    found = []

    def collect(graph, inputs):
        found.append(graph)
        return graph.forward

    with CUDA:
        model = build(spec)
    loss = partial(nested_cross_entropy, label_smoothing=0.1)
    objective = Objective(model, loss, weights=None, precision=precision)
    images = torch.zeros(8, 64, 64, 3, dtype=torch.uint8, device=CUDA)
    labels = torch.zeros(8, dtype=torch.int64, device=CUDA)
    torch.compile(objective, dynamic=False, backend=collect)(images, labels)
    return found


def on_host(graph: torch.fx.GraphModule) -> list[str]:
    """The nodes of a graph whose value is a tensor of the host."""
    names = []
    for node in graph.graph.nodes:
        values = tree_leaves(node.meta.get("example_value"))
        if any(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in values):
            names.append(node.name)
    return names


@pytest.mark.parametrize(
    ("dims", "shared"), [((512,), False), ((8, 64, 512), False), ((8, 64, 512), True)]
)
def test_a_compiled_step_is_one_graph_without_a_tensor_of_the_host(monkeypatch, dims, shared):
    """Normalisation, model and loss of a fixed feature, MRL and MRL-E."""
    with fake_cuda(monkeypatch):
        graphs = graphs_of(ModelSpec("resnet10", 10, dims, efficient=shared), "bf16")
    assert [on_host(graph) for graph in graphs] == [[]]


def test_a_mask_from_the_host_would_be_found(monkeypatch):
    def from_host(dims, device):
        return (torch.arange(dims[-1]) < torch.tensor(dims)[:, None]).to(device)

    monkeypatch.setattr(nested, "_compare", from_host)
    with fake_cuda(monkeypatch):
        graphs = graphs_of(ModelSpec("resnet10", 10, (8, 64, 512), efficient=True), "fp32")
    assert any(on_host(graph) for graph in graphs)


# ---------------------------------------------------------------- compilations


def counted_compilations(monkeypatch) -> list[int]:
    """Grows by one for every graph that torch.compile makes; they run eagerly."""
    torch._dynamo.reset()
    compiled = []
    real: Callable = torch.compile

    def backend(graph, inputs):
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    def compile(module, *, dynamic, mode):
        return real(module, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", compile)
    return compiled


def test_each_size_of_images_is_compiled_once_and_an_odd_batch_never(monkeypatch):
    """64 to 128 px in steps of 32; twelve sizes, more than torch would compile by itself."""
    model = build(ModelSpec("fast_cnn", 10, (4, 8), arch_options={"dim": 8}))
    loss = partial(nested_cross_entropy, label_smoothing=0.1)
    objective = Objective(model, loss, weights=None, precision="fp32").train()
    compiled = counted_compilations(monkeypatch)
    for sizes in ([64, 96, 128], [*range(32, 80, 4)]):
        torch._dynamo.reset()
        compiled.clear()
        forward = compile_step(objective, "1", sizes={4}, shapes=len(sizes))
        for size in sizes:
            for count in (4, 4, 3, 4):  # one lost an image
                images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
                forward(images, torch.zeros(count, dtype=torch.int64))
        model.eval()
        with torch.no_grad():
            model(torch.zeros(5, 3, 48, 48))  # an evaluation
        model.train()
        assert len(compiled) == len(sizes)


def test_a_share_of_mixed_images_is_no_reason_to_compile_again(monkeypatch):
    model = build(ModelSpec("fast_cnn", 10, (4, 8), arch_options={"dim": 8}))
    objective = Objective(model, nested_cross_entropy, weights=None, precision="fp32").train()
    compiled = counted_compilations(monkeypatch)
    forward = compile_step(objective, "1", sizes={4})
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    for share in (0.3, 0.4, 1.0):
        got = forward(images, labels, labels.flip(0), share)
        want = objective(images, labels, labels.flip(0), share)
        torch.testing.assert_close(got, want)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("local", "largest", "sizes"), [(8, 8, {8}), (8, 3, {3, 2}), (9, 3, {3}), (5, 8, {5})]
)
def test_sizes_of_the_parts_of_a_batch(local, largest, sizes):
    assert part_sizes(local, largest) == sizes


def test_graphs_begin_a_step_and_no_other_mode_does(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(torch, "compile", lambda module, **how: modes.append(how) or module)
    modes = []
    for how in (None, "1", "graphs"):
        compile_step(torch.nn.Identity(), how).begin_step()
    assert begun == [1]
    assert [how["mode"] for how in modes] == [None, "reduce-overhead"]
    assert all(how["dynamic"] is False for how in modes)


@pytest.mark.parametrize(
    ("given", "device", "steps", "want"),
    [
        (None, "cuda", 10_000, "1"),
        (None, "cuda", 100, None),  # compiling would take longer than it saves
        (None, "cpu", 10_000, None),
        ("0", "cuda", 10_000, None),
        ("1", "cpu", 1, "1"),
        ("graphs", "cuda", 1, "graphs"),
    ],
)
def test_what_is_compiled_when(given, device, steps, want):
    training = type("T", (), {"compile": given, "deterministic": False})
    assert compiling.requested(training, torch.device(device), steps) == want


def test_what_stays_outside_of_graphs_is_said():
    data, none = SimpleNamespace(randaugment=9.0), SimpleNamespace()
    of = {name: SimpleNamespace(optimizer=name) for name in OPTIMIZERS}
    assert compiling.outside_graphs(none, of["sgd"]) == []
    assert compiling.outside_graphs(data, of["adamw"]) == ["RandAugment"]
    assert compiling.outside_graphs(data, of["lars"]) == ["RandAugment", "the update of lars"]
    assert compiling.outside_graphs(none, of["muon"]) == ["the update of muon"]
