"""A run that starts from weights: exactly those, on every rank and stage, once, and never at a resume."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import RunError
from pretrain import checkpoint, encoders
from pretrain.config import RunConfig
from pretrain.engines.storage import read_model
from pretrain.export.timm_folder import Backbone, write
from pretrain.judging.subject import evaluation_view
from pretrain.run.folder import RunFolder
from pretrain.run.fork import Fork
from pretrain.run.main import prepare
from tests.pretrain.run.test_main import Ranks, config_for, losses, run_on, train_here

FIRST_STEP = ("train.stop_after=1 steps", "optimizer.warmup=2 steps", "data.workers=0")
"""The first step of a warm-up has a rate of nothing, so that the weights are still those of the start."""


def weights_for(config: RunConfig, file: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    state = encoders.build(config.encoder, (32, 32)).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return state


@pytest.mark.parametrize(
    ("smoke", "count", "stage"), [("mae", 2, 3), ("moco", 2, 2), ("moco_v3", 1, 1), ("clip", 1, 0)]
)
def test_the_first_step_sees_them(
    ranks: Ranks, tmp_path: Path, digits: Path, smoke: str, count: int, stage: int
) -> None:
    file, root = tmp_path / "weights.safetensors", tmp_path / "run"
    if smoke == "clip":  # needs captions, which it makes
        digits = tmp_path / "data" / "shapes"
    overrides = [f"encoder.weights={file}", f"train.zero_stage={stage}", *FIRST_STEP]
    if smoke == "clip":  # whose warm-up begins with a rate otherwise
        overrides += ["data.demo.samples=128", "data.demo.val_samples=32", "optimizer.warmup_from=zero"]
    config = config_for(root, digits, *overrides, smoke=smoke)
    wanted = weights_for(config, file)
    run_on(ranks, count, config)
    newest = checkpoint.latest(root)
    assert newest is not None
    found = read_model(newest)
    encoder = encoders.build(config.encoder, (32, 32))
    for name, _ in encoder.named_parameters():  # running statistics have moved
        assert torch.equal(found[f"encoder.{name}"], wanted[name]), name
        if f"teacher_encoder.{name}" in found:
            assert torch.equal(found[f"teacher_encoder.{name}"], wanted[name]), name


def test_a_resume_looks_at_the_checkpoint_alone(
    ranks: Ranks, tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, root = tmp_path / "weights.safetensors", tmp_path / "run"
    config = config_for(root, digits, f"encoder.weights={file}", *FIRST_STEP)
    weights_for(config, file)
    folder = prepare(config, world_size=1)
    told = folder.read_state()["starting_weights"]
    assert told["source"] == str(file) and "left out: nothing" in told["taken"] and len(told["sha256"]) == 64
    file.unlink()  # what the job needs lies in the run folder
    ranks(1, train_here, root=str(root))
    folder.starting_weights.unlink()
    monkeypatch.chdir(tmp_path)  # a relative path still means the file, though it is gone
    config = config.model_copy(
        update={"encoder": config.encoder.model_copy(update={"weights": "weights.safetensors"})}
    )
    again = config.model_copy(update={"train": config.train.model_copy(update={"stop_after": None})})
    assert len(run_on(ranks, 1, again)) == len(losses(root)) > 1


def test_lost_weights_are_said_in_a_line(ranks: Ranks, tmp_path: Path, digits: Path) -> None:
    file, root = tmp_path / "weights.safetensors", tmp_path / "run"
    config = config_for(root, digits, f"encoder.weights={file}", *FIRST_STEP)
    weights_for(config, file)
    prepare(config, world_size=1).starting_weights.unlink()
    with pytest.raises(RunError, match=r"start.safetensors: is gone, and there is no checkpoint yet"):
        ranks(1, train_here, root=str(root))


def test_what_does_not_fit_leaves_nothing_behind(tmp_path: Path, digits: Path) -> None:
    file, root = tmp_path / "weights.safetensors", tmp_path / "run"
    config = config_for(root, digits, f"encoder.weights={file}")
    state = weights_for(config, file)
    state.pop("norm.weight")
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    with pytest.raises(RunError, match=r"^encoder.weights: .*lacks norm.weight"):
        prepare(config, world_size=1)
    file.unlink()
    with pytest.raises(RunError, match=r"^encoder.weights: .* neither a file, nor a folder, nor a name"):
        prepare(config, world_size=1)
    assert not root.exists()


def test_one_runs_export_is_another_runs_start(tmp_path: Path, digits: Path) -> None:
    """Also of a ViT pooled by its patches, whose export has timm's pooling."""
    config = config_for(tmp_path / "run", digits, f"encoder.weights={tmp_path / 'export'}")
    torch.manual_seed(11)
    encoder = encoders.build(config.encoder, (32, 32))
    assert config.encoder.pooling == "avg"
    view = evaluation_view(config.objective.views((32, 32))[0])
    write(Backbone(encoder, config.encoder, view), tmp_path / "export")
    found = load_file(prepare(config, world_size=1).starting_weights)
    assert found.keys() == encoder.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in encoder.state_dict().items())


def test_a_fork_never_looks_at_them(tmp_path: Path, digits: Path, ranks: Ranks) -> None:
    run_on(ranks, 1, config_for(tmp_path / "parent", digits, *FIRST_STEP))
    config = config_for(tmp_path / "fork", digits, "encoder.weights=gone.pth", *FIRST_STEP)
    folder = prepare(config, world_size=1, fork=Fork(tmp_path / "parent"))
    assert "starting_weights" not in folder.read_state() and not folder.starting_weights.exists()
    assert ranks(1, train_here, root=str(folder.root)) == ["stop_after"]


def test_other_weights_are_another_run(tmp_path: Path, digits: Path) -> None:
    file, root = tmp_path / "weights.safetensors", tmp_path / "run"
    config = config_for(root, digits, f"encoder.weights={file}")
    weights_for(config, file)
    prepare(config, world_size=1)
    with pytest.raises(RunError, match=r"^encoder.weights: found None"):
        prepare(config_for(root, digits), world_size=1)
    assert RunFolder(root).starting_weights.exists()


def test_a_jump_of_the_rate_is_said_where_a_fork_makes_it(
    tmp_path: Path, digits: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    parent = config_for(tmp_path / "parent", digits, "train.stop_after=20 steps", "data.workers=0")
    run_on(ranks, 1, parent)
    caplog.set_level(logging.WARNING)
    same = config_for(tmp_path / "same", digits, "data.workers=0", "run.seed=3")
    prepare(same, world_size=1, fork=Fork(tmp_path / "parent"))
    assert "jumps at the branch" not in caplog.text
    longer = config_for(tmp_path / "longer", digits, "data.workers=0", "train.duration=100 steps")
    told = prepare(longer, world_size=1, fork=Fork(tmp_path / "parent")).read_state()["parent"]
    assert told["fork_rate"] > 5 * told["rate"] > 0
    assert "the learning rate jumps at the branch from" in caplog.text
    assert "that of 100 steps at step 20, the parent's was that of 24 steps at step 20" in caplog.text
