"""What a new optimizer has to show. Run it beside the optimizer: `pytest test_my_optimizer.py`."""

import copy

import pytest
import torch
from my_optimizer import Signum
from transformers import LlamaConfig, LlamaForCausalLM

import hf_momentum

D = torch.float64


def reference(w, gradients, lr, beta, weight_decay):
    """The recurrence as it stands in the paper, number by number, sharing no line with the optimizer."""
    w, m = list(w), [0.0] * len(w)
    for g in gradients:
        for i, gi in enumerate(g):
            m[i] = beta * m[i] + (1 - beta) * gi
            w[i] = (1 - lr * weight_decay) * w[i] - lr * ((m[i] > 0) - (m[i] < 0))
    return w


def test_it_is_the_recurrence():
    torch.manual_seed(0)
    start, gradients = torch.randn(7, dtype=D), torch.randn(200, 7, dtype=D)
    w = torch.nn.Parameter(start.clone())
    optimizer = Signum([w], lr=0.01, momentum=0.8, weight_decay=0.1)
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    expected = reference(start.tolist(), gradients.tolist(), 0.01, 0.8, 0.1)
    torch.testing.assert_close(w.detach(), torch.tensor(expected, dtype=D), rtol=0, atol=1e-12)


def test_without_momentum_it_is_sign_descent():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    w.grad = torch.tensor([5.0, -0.01, 0.0])
    Signum([w], lr=0.5, momentum=0.0).step()
    assert w.tolist() == [0.5, -1.5, 0.5]


def test_the_scale_of_the_loss_does_not_matter():
    ends = []
    for scale in (1.0, 1024.0):
        w = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        optimizer = Signum([w], lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            (scale * w.square().sum()).backward()
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_a_checkpoint_continues_bit_for_bit():
    def steps(w, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            w.cos().sum().backward()
            optimizer.step()

    w = torch.nn.Parameter(torch.linspace(-2, 2, 9))
    optimizer = Signum([w], lr=0.01)
    steps(w, optimizer, 5)
    again = torch.nn.Parameter(w.detach().clone())
    resumed = Signum([again], lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(w, optimizer, 5)
    steps(again, resumed, 5)
    assert torch.equal(w, again)


def test_a_wrong_value_is_named():
    with pytest.raises(ValueError, match=r"Signum: momentum must be a number in \[0, 1\), got 1.5; 0.9 is usual"):
        Signum([torch.zeros(1, requires_grad=True)], momentum=1.5)


@pytest.mark.parametrize("trainer", ["Trainer", "MomentumTrainer"])
def test_a_trainer_runs_it_by_its_name(trainer, tmp_path):
    import transformers

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        optim="signum",
        optim_args="momentum=0.5",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    cls = transformers.Trainer if trainer == "Trainer" else hf_momentum.MomentumTrainer
    run = cls(model, args, train_dataset=rows)
    run.train()
    assert type(run.optimizer.optimizer) is Signum, "under Accelerate's wrapper"
    assert run.optimizer.param_groups[0]["momentum"] == 0.5
    moved = max(float((model.state_dict()[name] - before[name]).abs().max()) for name in before)
    assert moved == pytest.approx(1e-3, rel=1e-3), "each weight moves by lr"


def test_a_loop_of_your_own_makes_it_by_its_name():
    optimizer = hf_momentum.create_optimizer("signum", torch.nn.Linear(2, 2), lr=1e-3, weight_decay=0.1, momentum=0.8)
    assert isinstance(optimizer, Signum)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0], "biases are spared"
