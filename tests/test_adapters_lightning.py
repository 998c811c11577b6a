"""Lightning's Trainer with our optimizers: the class that ran, and its weights against our own Trainer's."""

import copy
import warnings

import pytest
import torch
import transformers

import hf_momentum
from hf_momentum import InputError
from tests.adapters.replay import InOrder, check, furthest, ours
from tests.adapters.specimen import SETTINGS
from tests.test_adapters import Network, batches, finished

L = pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'hf-momentum[adapters]'")


class Module(L.LightningModule):
    def __init__(self, network: torch.nn.Module, name: str = "tam", **settings) -> None:
        super().__init__()
        self.network, self.name = network, name
        self.settings = {"lr": 0.05, "weight_decay": 0.1, **settings}

    def training_step(self, batch, index):
        return self.network(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = hf_momentum.create_optimizer(self.name, self.network, **self.settings)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(module: Module, folder, clip: float | None = None, **settings) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, accumulate_grad_batches=2, gradient_clip_val=clip, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(InOrder(batches()), batch_size=None), **settings)
    return trainer


# Lightning clips before the step, an optimizer of ours inside of it: both are what our Trainer does.
@pytest.mark.parametrize("inside", [False, True], ids=["Lightning-clips", "the-optimizer-clips"])
def test_lightning_trains_as_our_trainer_does(inside, tmp_path):
    network, before = Network(), Network()
    before.load_state_dict(network.state_dict())
    own, clip = ({"max_grad_norm": 0.5}, None) if inside else ({}, 0.5)
    trainer = trained(Module(network, gamma=0.95, **own), tmp_path, clip)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is hf_momentum.TAM and len(optimizer.param_groups) == 2
    check(finished(before, network), before, tmp_path, optim="tam", **SETTINGS)


def test_ahb_sees_gradients_before_they_are_clipped_only_where_it_clips_itself(tmp_path):
    """Under Lightning's own clipping its differences are those of clipped gradients; in our Trainer they are not."""
    start = Network()
    weights = {}
    for label, own, clip in (("lightning", {}, 0.5), ("inside", {"max_grad_norm": 0.5}, None)):
        network = copy.deepcopy(start)
        trained(Module(network, "ahb_sgd", **own), tmp_path, clip)
        weights[label] = network
    settings = {key: value for key, value in SETTINGS.items() if key != "optim_args"}
    wanted = ours(finished(start, weights["inside"]), start, tmp_path, optim="ahb_sgd", **settings)
    assert furthest(weights["inside"].state_dict(), wanted) < 1e-6
    assert furthest(weights["lightning"].state_dict(), wanted) > 1e-5


def test_a_checkpoint_of_lightning_continues_bit_for_bit(tmp_path):
    """Two epochs of two steps: at a stretch, and with a checkpoint between."""
    start, halves = Network(), Module(Network(), gamma=0.95)
    halves.network.load_state_dict(start.state_dict())
    whole = Module(start, gamma=0.95)
    loader = torch.utils.data.DataLoader(InOrder(batches(4)), batch_size=None)
    quiet = {
        "accelerator": "cpu", "accumulate_grad_batches": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    L.Trainer(max_epochs=2, enable_checkpointing=False, **quiet).fit(whole, loader)
    keep = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="half")
    L.Trainer(max_epochs=1, callbacks=[keep], **quiet).fit(halves, loader)
    continued = Module(Network(), gamma=0.95)
    rest = L.Trainer(max_epochs=2, enable_checkpointing=False, **quiet)
    rest.fit(continued, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.global_step == 4
    assert furthest(whole.network.state_dict(), halves.network.state_dict()) > 1e-4
    assert furthest(whole.network.state_dict(), continued.network.state_dict()) == 0


def test_a_misspelt_argument_stops_lightning_before_it_trains(tmp_path):
    with pytest.raises(InputError, match=r"tam has no argument 'gama' .did you mean 'gamma'"):
        trained(Module(Network(), gama=0.95), tmp_path)
