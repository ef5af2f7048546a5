"""DeepSpeed behind the `Engine` port: ZeRO stages 0 to 3, accumulation, clipping, loss scaling, checkpoints.

Parameters are fp32 whatever the precision; half precision comes from autocast inside the objective's forward.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.engines import blocks, fragments, state
from pretrain.engines.config import Precision
from pretrain.engines.processes import Processes
from pretrain.engines.statistics import Statistics
from pretrain.objective import LossOutput, Objective, ParamGroup
from pretrain.ports import StepSettings


def initialize(
    objective: Objective,
    make_optimizer: Callable[[Sequence[ParamGroup]], torch.optim.Optimizer],
    processes: Processes,
    *,
    micro_batch: int,
    accumulation: int = 1,
    zero_stage: int = 1,
    gradient_clip: float = 0.0,
    precision: Precision = "fp32",
    tf32: bool = False,
    activation_checkpointing: bool = False,
    compile_backend: str | None = None,
    offload_optimizer: bool = False,
    expects_saves: bool = False,
    regroup: Callable[[Sequence[ParamGroup]], list[ParamGroup]] = list,
) -> DeepSpeedEngine:
    """Wrap `objective` for training; collective. The object stays usable, its parameters are the engine's.

    `micro_batch`: samples a rank takes at once; `accumulation`: micro-batches a step; `compile_backend`: of
    torch.compile, block by block; `expects_saves`: get the memory of `stage` before it is called; `regroup`:
    changes the objective's parameter groups; the others as in `EngineConfig`, which has refused what can't
    be. Every trainable parameter must be in one group.
    """
    fragments.require_known_deepspeed()
    # DeepSpeed's calls of names that torch has renamed: nothing a user could act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Only inference uses it, and on CPU it would be compiled (a minute) before the first step.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _allow_tf32(processes.device, tf32)
    objective.to(processes.device)
    if compile_backend is not None:
        blocks.compile_blocks(objective, compile_backend)
    if activation_checkpointing:
        blocks.recompute(objective)
    groups = [group for group in regroup(objective.param_groups()) if group.parameters]
    _require_every_parameter_once(objective, groups)
    optimizer = make_optimizer(groups)
    settings = _settings(objective, micro_batch, accumulation, zero_stage, gradient_clip, offload_optimizer)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=settings, dist_init_required=False
    )
    scale = LossScale() if precision == "fp16" else None
    return DeepSpeedEngine(engine, objective, groups, accumulation, gradient_clip, scale, expects_saves)


def _allow_tf32(device: torch.device, allowed: bool) -> None:
    """For the whole process, as torch has it. cuDNN's convolutions would use TF32 unless told not to."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def _settings(
    objective: nn.Module,
    micro_batch: int,
    accumulation: int,
    zero_stage: int,
    gradient_clip: float,
    offload: bool,
) -> dict[str, Any]:
    # DeepSpeed allocates whole buckets of 5e8 elements by default, 2 GB however small the model.
    size = sum(p.numel() for p in objective.parameters())
    bucket = 2 ** min(max(size.bit_length(), 16), 26)  # ZeRO wants it to divide by twice the ranks or so
    pin = torch.cuda.is_available()  # what a GPU copies to without waiting
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clip if zero_stage else 0.0,  # stage 0 is clipped here, see `step`
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": {"device": "cpu", "pin_memory": pin}} if offload else {}),
        },
    }


def _require_every_parameter_once(objective: nn.Module, groups: Sequence[ParamGroup]) -> None:
    grouped = [name for group in groups for name, _ in group.parameters]
    trainable = {name for name, p in objective.named_parameters() if p.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        differing = sorted(set(grouped) ^ trainable) or sorted({n for n in grouped if grouped.count(n) > 1})
        raise ValueError(
            f"param_groups() must hold every trainable parameter once; wrong for {differing[:5]}"
        )
    scalars = [name for group in groups for name, p in group.parameters if p.ndim == 0]
    if scalars:
        raise ValueError(f"DeepSpeed takes no 0-dim parameters; give shape [1] to {', '.join(scalars)}")


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halve on overflow, double after a calm interval.

    Micikevicius et al. 2018, arXiv:1710.03740 §3.2. DeepSpeed's own for autocast never lowers its scale.
    """

    value: float = 2.0**16
    calm: int = 0  # updates applied since the scale last changed
    interval: int = 2000
    least: float = 2.0**-14

    def applied(self) -> None:
        self.calm += 1
        if self.calm >= self.interval:
            self.value, self.calm = self.value * 2, 0

    def overflowed(self) -> None:
        self.value, self.calm = max(self.value / 2, self.least), 0


class DeepSpeedEngine:
    """`pretrain.ports.Engine` over one DeepSpeed engine."""

    def __init__(
        self,
        engine: Any,
        objective: Objective,
        groups: Sequence[ParamGroup],
        accumulation: int,
        gradient_clip: float,
        loss_scale: LossScale | None,
        expects_saves: bool,
    ) -> None:
        self.device: torch.device = engine.device
        self.zero_stage = int(engine.zero_optimization_stage())
        self.loss_scale = loss_scale
        self._engine, self._objective, self._groups = engine, objective, groups
        self._accumulation, self._clip = accumulation, gradient_clip
        self._names = {p: name for name, p in objective.named_parameters()}
        self._micro_batches = 0  # backward passes since the last step
        self._unsound = torch.zeros((), device=self.device)  # of them, those whose loss wasn't finite
        self._shards = fragments.shards(engine)
        self._statistics = Statistics(objective)
        self._buffers = state.HostBuffers()
        self._to_reserve = expects_saves
        self._compared = False  # whether frozen parameters have been found equal on all ranks
        self._group = dist.new_group(backend="gloo")  # of checkpoints alone, so that a thread may write them

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """The objective's forward on one micro-batch of this rank."""
        output = self._engine(batch, progress)
        assert isinstance(output, LossOutput)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; averaged over ranks at the last micro-batch of a step."""
        if self._micro_batches == self._accumulation:
            raise RuntimeError(f"{self._accumulation} micro-batches were taken; call step()")
        self._micro_batches += 1
        self._engine.set_gradient_accumulation_boundary(self._micro_batches == self._accumulation)
        self._unsound += ~loss.detach().isfinite()
        if self.loss_scale is not None:
            loss = self._scaled(loss, self.loss_scale.value)
        self._engine.backward(loss)

    def _scaled(self, loss: Tensor, scale: float) -> Tensor:
        if self.zero_stage == 0:
            return loss * scale
        self._engine.optimizer.loss_scale = scale  # ZeRO multiplies the loss and divides the gradients itself
        return loss

    def step(self, settings: StepSettings) -> ZeroUpdate | None:
        """Apply the accumulated gradients; None, with nothing changed, where they or a loss aren't finite.

        Reads one number from the device. DeepSpeed before 0.19.8 applied NaN, and stage 0 still does.
        """
        if self._micro_batches != self._accumulation:
            raise RuntimeError(f"step() after {self._micro_batches} of {self._accumulation} micro-batches")
        self._micro_batches = 0
        for group, own in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = settings.lr * own.lr_scale
            group["weight_decay"] = settings.weight_decay * own.weight_decay_scale
        gradients = fragments.gradients(self._engine, self._shards)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        norm = self._norm(gradients) / scale
        finite = math.isfinite(norm.item())
        if self.loss_scale is not None:
            self.loss_scale.applied() if finite else self.loss_scale.overflowed()
        if not finite:
            with _without_effect(fragments.base_optimizer(self._engine)):
                self._engine.step()
            self._statistics.restore()
            return None
        if self.zero_stage == 0:  # from stage 1 on DeepSpeed unscales and clips
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0) if self._clip else torch.ones_like(norm)
            if self._clip or scale != 1.0:
                torch._foreach_mul_(gradients, factor / scale)
        self._engine.step()
        self._statistics.keep()
        if self._to_reserve:  # not before the first update has made the moments
            self._to_reserve = False
            self._buffers.reserve(state.owned(self._engine, self._shards, self._group))
        return ZeroUpdate(norm, self._shards, self._names)

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Global L2 norm, () float32, of gradients that are whole (stage 0) or shards; NaN for a bad loss."""
        norm = nn.utils.get_total_norm(gradients).to(self.device, torch.float32)
        told = torch.stack([norm.square(), self._unsound])
        dist.all_reduce(told)
        self._unsound = torch.zeros_like(self._unsound)
        return torch.where(told[1] > 0, torch.nan, told[0].sqrt() if self.zero_stage else norm)

    @contextmanager
    def whole_parameters(self) -> Iterator[nn.Module]:
        """The objective in eval mode with every parameter whole on every rank, for reading; collective.

        Batch-norm statistics are meanwhile their mean over ranks. Those and the training flags come back.
        """
        training = [module for module in self._objective.modules() if module.training]
        with self._statistics.averaged():
            self._objective.eval()
            try:
                with nullcontext() if self.zero_stage < 3 else _gathered(self._objective):
                    yield self._objective
            finally:
                for module in training:
                    module.training = True

    def stage(self, extra: Mapping[str, Any]) -> state.Staged:
        """Copy this rank's state to host memory; collective. Training may go on while it is written.

        The memory is used again: what was staged before must be written by then. Raises `RunError` where a
        buffer, of which one is kept, differs between ranks.
        """
        self._statistics.average()
        state.require_equal_replicas(self._engine, self._group, frozen=not self._compared)
        self._compared = True
        scale = None if self.loss_scale is None else vars(self.loss_scale)
        engine_state = {"zero_stage": self.zero_stage, "loss_scale": scale}
        return state.stage(self._engine, self._shards, self._buffers, self._group, engine_state, extra)

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write the whole state into an empty folder; collective. `extra`: JSON values, rank 0's are kept."""
        self.stage(extra).write(directory)

    def load(self, directory: Path) -> dict[str, Any]:
        """Restore what `save` wrote at any number of ranks and any stage; collective; gives `extra` back.

        Raises `RunError` where the folder holds another model. Random states return to as many ranks.
        """
        found = state.load(self._engine, self._shards, self._group, directory)
        self._statistics.keep()
        if self.loss_scale is not None and found["loss_scale"] is not None:
            self.loss_scale = LossScale(**found["loss_scale"])
        extra = found["extra"]
        assert isinstance(extra, dict)
        return extra

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers; the engine is of no use afterwards."""
        self._engine.destroy()


@contextmanager
def _without_effect(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A step of `optimizer` changes nothing: DeepSpeed drops gradients and gathers the same parameters."""
    object.__setattr__(optimizer, "step", lambda closure=None: None)
    try:
        yield
    finally:
        object.__delattr__(optimizer, "step")


@dataclass
class ZeroUpdate:
    """An applied update; see `objective.Update`."""

    grad_norm: Tensor  # () float32, before clipping
    _shards: Sequence[fragments.Shard]
    _names: Mapping[nn.Parameter, str]

    @torch.no_grad()
    def lerp(self, teacher: nn.Module, student: nn.Module, momentum: float) -> None:
        """Move teacher to momentum * teacher + (1 - momentum) * student, by parameter name; local."""
        students = dict(student.named_parameters())
        teachers = dict(teacher.named_parameters())
        if students.keys() != teachers.keys():
            differing = sorted(students.keys() ^ teachers.keys())
            raise ValueError(f"teacher and student differ in their parameters: {', '.join(differing[:5])}")
        pairs = [p for name in teachers for p in fragments.working_pairs(teachers[name], students[name])]
        if pairs:
            torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1.0 - momentum)

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a whole parameter, its fp32 master included; `value` is the same on every rank."""
        name = self._names[parameter]
        whole = value.detach().to(torch.float32)
        for shard in self._shards:
            for piece in shard.pieces:
                if piece.name == name:
                    part = whole.reshape(-1)[piece.start : piece.start + piece.length]
                    fragments.write_slice(shard.master, piece.offset, part)
        fragments.write_working(parameter, whole)

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, highest: float, lowest: float | None = None) -> None:
        """Bound a parameter, its fp32 master included; no communication."""
        name = self._names[parameter]
        for shard in self._shards:
            for piece in shard.pieces:
                if piece.name == name:
                    part = fragments.read_slice(shard.master, piece.offset, piece.length)
                    fragments.write_slice(shard.master, piece.offset, part.clamp(lowest, highest))
        for working, _ in fragments.working_pairs(parameter, parameter):
            working.clamp_(lowest, highest)


@contextmanager
def _gathered(objective: nn.Module) -> Iterator[None]:
    """ZeRO-3 parameters as plain whole copies, and ZeRO's hooks out of the way.

    With the hooks left in, a forward on one rank only would wait for the others for ever.
    """
    modules = list(objective.modules())
    kept = [(m._parameters, m._forward_pre_hooks, m._forward_hooks) for m in modules]
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for p in objective.parameters():  # one by one: two whole models at a time would be one too many
        with deepspeed.zero.GatheredParameters([p]):
            copies[p] = nn.Parameter(p.data.clone(), requires_grad=p.requires_grad)
    try:
        for module in modules:
            own = {name: None if p is None else copies[p] for name, p in module._parameters.items()}
            object.__setattr__(module, "_parameters", own)
            object.__setattr__(module, "_forward_pre_hooks", type(module._forward_pre_hooks)())
            object.__setattr__(module, "_forward_hooks", type(module._forward_hooks)())
        yield
    finally:
        for module, (parameters, before, after) in zip(modules, kept, strict=True):
            object.__setattr__(module, "_parameters", parameters)
            object.__setattr__(module, "_forward_pre_hooks", before)
            object.__setattr__(module, "_forward_hooks", after)
