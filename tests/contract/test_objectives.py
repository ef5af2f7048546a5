"""What every objective must keep, by lying in the folder: built from its smoke config, without data."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import yaml
from torch import nn

from configs.loading import PACKAGED, dump, load, validate
from data_pipeline.types import Batch
from pretrain import encoders, objectives
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.objective import BuildContext, Objective
from pretrain.optimizers import OptimizerConfig

EVERY = sorted(path.stem for path in (PACKAGED / "smoke").glob("*.yaml"))
"""Every objective, one with two losses twice."""
CLOCK = Progress(step=3, samples=96, total_steps=10, dataset_size=1000)


def smoke(name: str) -> RunConfig:
    return load(f"configs/smoke/{name}.yaml", RunConfig)


def build(name: str, autocast: torch.dtype | None = None) -> Objective:
    config = smoke(name)
    size = config.data.image_size
    image_size = size if isinstance(size, tuple) else (size, size)
    torch.manual_seed(0)
    encoder = encoders.build(config.encoder, image_size)
    return config.objective.build(BuildContext(encoder, image_size, 1000, 8, autocast))


def batch_for(name: str, count: int = 8) -> Batch:
    config = smoke(name)
    size = config.data.image_size
    image_size = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(2)
    views = tuple(
        torch.randn(count, 3, *spec.size, generator=generator) for spec in config.objective.views(image_size)
    )
    seeds = torch.randint(0, 2**62, (count,), generator=generator)
    tokens = torch.randint(1, 200, (count, 9), generator=generator)  # each row's EOT is its largest
    return Batch(views, seeds, torch.arange(count), target=torch.arange(count) % 3, tokens=tokens)


def test_every_objective_has_a_smoke_config() -> None:
    assert {smoke(name).objective.name for name in EVERY} == set(objectives.names())


@pytest.mark.parametrize("name", objectives.names())
def test_it_states_its_source(name: str) -> None:
    build(name)
    module = sys.modules[f"pretrain.objectives.{name}"]
    assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__ or "")


@pytest.mark.parametrize("name", EVERY)
def test_the_loss_is_a_finite_fp32_scalar_and_metrics_are_detached(name: str) -> None:
    output = build(name)(batch_for(name), CLOCK)
    assert output.loss.shape == () and output.loss.dtype == torch.float32
    assert output.loss.isfinite() and output.loss.requires_grad
    assert all(m.shape == () and not m.requires_grad for m in output.metrics.values())


@pytest.mark.parametrize("name", EVERY)
def test_the_same_batch_gives_the_same_loss(name: str) -> None:
    """All chance comes from the samples' seeds, none from torch's generator."""
    objective, batch = build(name), batch_for(name)
    first = objective(batch, CLOCK).loss
    torch.manual_seed(99)
    assert torch.equal(objective(batch, CLOCK).loss, first)


@pytest.mark.parametrize("name", EVERY)
def test_every_trainable_parameter_is_in_one_group_and_gets_a_gradient(name: str) -> None:
    objective = build(name)
    grouped = [key for group in objective.param_groups() for key, _ in group.parameters]
    trainable = [key for key, p in objective.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    objective(batch_for(name), CLOCK).loss.backward()
    without = [key for key, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", EVERY)
def test_only_matrices_decay_where_asked(name: str) -> None:
    """`optimizer.decays: matrices`, against timm's own list for the encoder and by kind for the rest."""
    objective = build(name)
    published = objective.param_groups()
    assert smoke(name).optimizer.regroup(published) == published
    groups = OptimizerConfig(lr=1.0, decays="matrices").regroup(published)
    scales = {n: group.weight_decay_scale for group in groups for n, _ in group.parameters}
    assert scales.keys() == {n for group in published for n, _ in group.parameters}
    spared = {f"encoder.{n}" for n in getattr(objective.encoder, "no_weight_decay", set)()}
    spared |= {"mask_token", "logit_scale", "logit_bias", "text.positional_embedding"}
    spared |= {n for n in scales if n.endswith("bias")}
    weights = set()
    for n, module in objective.named_modules():
        weights |= {f"{n}.weight"} if isinstance(module, nn.Linear | nn.Conv2d) else set()
        spared |= {f"{n}.weight"} if isinstance(module, nn.LayerNorm | nn.BatchNorm2d) else set()
    assert all(scales[n] == 0 for n in spared & scales.keys())
    assert all(scales[n] == 1 for n in weights & scales.keys())


@pytest.mark.parametrize("name", EVERY)
def test_it_starts_from_weights_and_so_do_its_teachers(name: str) -> None:
    objective = build(name)
    torch.manual_seed(7)
    size = smoke(name).objective.views((32, 32))[0].size
    other = encoders.build(smoke(name).encoder, size).state_dict()
    objective.start_from(lambda encoder: encoder.load_state_dict(other) and None)
    followers = {"encoder", *smoke(name).objective.slow_encoders.values()}
    # Whatever else has an encoder's parameters under its names is one, too: a teacher that nobody names.
    alike = {n for n, m in objective.named_children() if m.state_dict().keys() == other.keys()}
    assert followers == alike
    for follower in followers:
        state = objective.get_submodule(follower).state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("name", EVERY)
def test_bf16_autocast_is_near_fp32(name: str) -> None:
    objective, half = build(name), build(name, torch.bfloat16)
    half.load_state_dict(objective.state_dict())
    whole = objective(batch_for(name), CLOCK).loss
    loss = half(batch_for(name), CLOCK).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", EVERY)
def test_it_trains(name: str) -> None:
    """Thirty steps on one batch at least dent the loss."""
    objective, batch = build(name), batch_for(name)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective(batch, CLOCK).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", EVERY)
def test_pictures_and_figures_are_what_they_should_be_and_leave_no_trace(name: str) -> None:
    """Of an objective that makes any: which do is held beside, so that a lost one is missed."""
    objective, batch = build(name), batch_for(name)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    pictures, figures = objective.pictures(batch), objective.judge(batch)
    assert bool(pictures) == (type(objective).pictures is not Objective.pictures)
    assert bool(figures) == (type(objective).judge is not Objective.judge)
    for picture in pictures.values():
        assert picture.ndim == 3 and picture.shape[0] == 3
        assert picture.min() >= 0 and picture.max() <= 1
    for scalar in figures.values():
        assert scalar.shape == () and scalar.isfinite()
    assert all(torch.equal(before[key], value) for key, value in objective.state_dict().items())


def test_some_objective_draws_and_judges() -> None:
    """Else the test above would hold of nothing."""
    kinds = [type(build(name)) for name in EVERY]
    assert any(kind.pictures is not Objective.pictures for kind in kinds)
    assert any(kind.judge is not Objective.judge for kind in kinds)


@pytest.mark.parametrize("name", EVERY)
def test_its_config_dumps_and_reloads(name: str) -> None:
    config = smoke(name)
    assert validate(yaml.safe_load(dump(config)), RunConfig, name) == config


def test_an_objective_from_outside_the_tree(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A dotted name is a module of somebody else's: nothing of keel is touched."""
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "brightness.py").write_text(
        "from pretrain.objective import LossOutput, Objective, ObjectiveConfig, ParamGroup\n"
        "from data_pipeline.types import CenterCrop, ViewSpec\n"
        "class BrightnessConfig(ObjectiveConfig):\n"
        "    name: str = 'mylab.brightness'\n"
        "    gain: float = 1.0\n"
        "    def views(self, image_size):\n"
        "        return [ViewSpec(image_size, CenterCrop())]\n"
        "    def build(self, context):\n"
        "        return Brightness(self, context)\n"
        "class Brightness(Objective):\n"
        "    def __init__(self, config, context):\n"
        "        super().__init__()\n"
        "        self.encoder, self.gain = context.encoder, config.gain\n"
        "    def forward(self, batch, progress):\n"
        "        feature = self.encoder(batch.views[0]).mean(1)\n"
        "        wanted = self.gain * batch.views[0].mean((1, 2, 3))\n"
        "        return LossOutput((feature - wanted).square().mean(), {})\n"
        "    def param_groups(self):\n"
        "        return [ParamGroup(list(self.named_parameters()))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # An override can't take the other objective's settings away, so a file of one's own it is.
    own = tmp_path / "own.yaml"
    settings = yaml.safe_load(dump(smoke("mae"))) | {"objective": {"name": "mylab.brightness", "gain": 2.0}}
    own.write_text(yaml.safe_dump(settings))
    config = load(own, RunConfig)
    context = BuildContext(encoders.build(config.encoder, (32, 32)), (32, 32), 1000, 8, None)
    assert config.objective.build(context)(batch_for("mae"), CLOCK).loss.isfinite()
    with pytest.raises(Exception, match=r"objective\.gian: no such setting; did you mean gain"):
        load(own, RunConfig, ["objective.gian=3"])
