"""torch.compile around the training step leaves the step as it is; where a GPU is there, a CUDA graph holds it."""

import pytest
import torch

from hf_momentum.integrations.registry import OPTIMIZERS
from hf_momentum.kernels import cuda

NAMES = list(OPTIMIZERS)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def training(name: str, device: str = "cpu", **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.Tanh(), torch.nn.Linear(256, 32)).to(device)
    optimizer = OPTIMIZERS[name].cls(model.parameters(), lr=1e-2, max_grad_norm=1.0, **kwargs)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return model, step


def batches(count: int, device: str = "cpu"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 16, generator=generator).to(device), torch.randn(8, 32, generator=generator).to(device)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_training_step_is_the_eager_one(name):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, step = training(name)
        run = torch.compile(step, backend="aot_eager") if compiled else step
        before = weights(model)
        for x, y in batches(5):
            run(x, y)
        assert not torch.equal(weights(model), before)
        found.append(weights(model))
    assert torch.equal(*found)


def test_compiling_a_step_compiles_nothing_of_ours():
    torch._dynamo.reset()
    _, step = training("tam")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(step, backend=backend)
    for x, y in batches(3):
        compiled(x, y)
    assert graphs, "the forward pass is compiled"
    assert not any("foreach" in code for code in graphs)


@on_gpu
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_the_gpu_waits_for_nothing(name, state_dtype):
    assert cuda.available() == (True, "")
    _, step = training(name, "cuda", state_dtype=state_dtype)
    for x, y in batches(3, "cuda"):
        step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches(3, "cuda"):
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_of_the_step_continues_as_the_eager_one(name):
    found = []
    for captured in (False, True):
        model, step = training(name, "cuda")
        x, y = torch.zeros(8, 16, device="cuda"), torch.zeros(8, 32, device="cuda")
        stream = torch.cuda.Stream()
        data = list(batches(8, "cuda"))
        with torch.cuda.stream(stream):
            for a, b in data[:3]:
                x.copy_(a), y.copy_(b)
                step(x, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph, stream=stream):
                step(x, y)
        for a, b in data[3:]:
            x.copy_(a), y.copy_(b)
            graph.replay() if captured else step(x, y)
        torch.cuda.synchronize()
        found.append(weights(model))
    assert ((found[0] - found[1]).norm() / found[0].norm()).item() < 1e-6
