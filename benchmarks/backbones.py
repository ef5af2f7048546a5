"""Which of timm's architectures go with which objective: docs/backbones.md, made by doing it.

    python benchmarks/backbones.py                    # every cell that runs/backbones.jsonl doesn't have yet
    python benchmarks/backbones.py --only clip vgg    # cells whose objective or architecture has the word
    python benchmarks/backbones.py --minutes 30       # stops after that long; the next call goes on
    python benchmarks/backbones.py --decide           # decides only: a minute
    python benchmarks/backbones.py --table            # only writes the page from what has run

A cell is decided on the meta device first, as `keel train` does before it starts: works, or refused in a
line. What works goes the whole way: one step on random images, the export, the export opened in this process
and, all together at the end, in a fresh one that imports nothing of keel, and the same weights at another,
non-square size.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.loading import load
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.encoders import EncoderConfig, weights
from pretrain.export import timm_folder
from pretrain.export.check import TOLERANCE
from pretrain.export.open import open_timm
from pretrain.judging.subject import evaluation_view
from pretrain.objective import BuildContext, Objective

OBJECTIVES = ("moco", "moco_v3", "clip", "siglip", "mae")
"""Names of smoke configs: an objective's name, or its second loss's."""

RECORD, PAGE = Path("runs/backbones.jsonl"), Path("docs/backbones.md")
BATCH, CLOCK = 8, Progress(3, 24, 10, 10_000)


@dataclass(frozen=True)
class Architecture:
    """The smallest of a family that timm names, made shallower where its arguments allow it."""

    name: str
    kind: str
    args: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (64, 64)
    other: tuple[int, int] = (96, 64)  # what its export is opened for besides
    pooling: encoders.Pooling = "token"
    large: bool = False  # 100 M parameters or more, which CI doesn't train

    @property
    def encoder(self) -> EncoderConfig:
        return EncoderConfig(name=self.name, args=dict(self.args), pooling=self.pooling)


_SHALLOW, _14 = {"depth": 2}, {"size": (56, 56), "other": (84, 56)}
_FOUR = {"depths": (1, 1, 1, 1)}

ARCHITECTURES = (
    Architecture("resnet18", "ResNet"),
    Architecture("resnet18d", "ResNet-D"),
    Architecture("resnetv2_18", "ResNet v2"),
    Architecture("seresnext26d_32x4d", "SE-ResNeXt"),
    Architecture("resnest14d", "ResNeSt"),
    Architecture("regnetx_002", "RegNetX"),
    Architecture("regnety_002", "RegNetY"),
    Architecture("efficientnet_b0", "EfficientNet"),
    Architecture("efficientnet_lite0", "EfficientNet-Lite"),
    Architecture("tf_efficientnetv2_b0", "EfficientNet v2"),
    Architecture("mobilenetv2_035", "MobileNet v2"),
    Architecture("mobilenetv3_small_050", "MobileNet v3"),
    Architecture("mobilenetv4_conv_small_035", "MobileNet v4"),
    Architecture("convnext_atto", "ConvNeXt"),
    Architecture("convnextv2_atto", "ConvNeXt v2"),
    Architecture("inception_next_atto", "InceptionNeXt"),
    Architecture("swin_tiny_patch4_window7_224", "Swin", _FOUR),
    Architecture("swinv2_tiny_window8_256", "Swin v2", _FOUR),
    Architecture("swinv2_cr_tiny_ns_224", "Swin v2 CR", _FOUR),
    Architecture("maxvit_rmlp_pico_rw_256", "MaxViT"),
    Architecture("coatnet_nano_rw_224", "CoAtNet"),
    Architecture("hiera_tiny_224", "Hiera"),
    Architecture("fastvit_t8", "FastViT"),
    Architecture("fastvit_mci0", "MobileCLIP's FastViT"),
    Architecture("repvit_m0_9", "RepViT"),
    Architecture("repvgg_a0", "RepVGG"),
    Architecture("mobileone_s0", "MobileOne"),
    Architecture("vit_tiny_patch16_224", "ViT", _SHALLOW),
    Architecture("deit_tiny_patch16_224", "DeiT", _SHALLOW),
    Architecture("deit_tiny_distilled_patch16_224", "DeiT, distilled", _SHALLOW),
    Architecture("deit3_small_patch16_224", "DeiT III", _SHALLOW),
    Architecture("vit_small_patch14_dinov2", "DINOv2", _SHALLOW, **_14),
    Architecture("vit_small_patch14_reg4_dinov2", "DINOv2 with registers", _SHALLOW, **_14),
    Architecture("vit_medium_patch16_gap_240", "ViT without class token", _SHALLOW),
    Architecture("vit_little_patch16_reg4_gap_256", "register ViT, pooling avg", _SHALLOW, pooling="avg"),
    Architecture("vit_base_patch32_clip_224", "CLIP's ViT", _SHALLOW),
    Architecture("vit_base_patch32_clip_quickgelu_224", "OpenAI's ViT", _SHALLOW),
    Architecture("vit_base_patch16_siglip_224", "SigLIP's ViT", _SHALLOW),
    Architecture("vit_tiny_r_s16_p8_224", "hybrid ViT", _SHALLOW),
    Architecture("vit_small_patch16_dinov3", "DINOv3", _SHALLOW),
    Architecture("vit_small_patch16_rope_224", "rotary ViT", _SHALLOW),
    Architecture("eva02_tiny_patch14_224", "EVA-02", _SHALLOW, **_14),
    Architecture("beit_base_patch16_224", "BEiT", _SHALLOW),
    Architecture("beitv2_base_patch16_224", "BEiT v2", _SHALLOW),
    Architecture("cait_xxs24_224", "CaiT", _SHALLOW),
    Architecture("xcit_nano_12_p16_224", "XCiT", _SHALLOW),
    Architecture("mixer_s32_224", "MLP-Mixer"),
    Architecture("poolformer_s12", "PoolFormer"),
    Architecture("pvt_v2_b0", "PVT v2"),
    Architecture("levit_128s", "LeViT"),
    Architecture("mobilevit_xxs", "MobileViT"),
    Architecture("mobilevitv2_050", "MobileViT v2"),
    Architecture("edgenext_xx_small", "EdgeNeXt"),
    Architecture("efficientformerv2_s0", "EfficientFormer v2"),
    Architecture("tiny_vit_5m_224", "TinyViT"),
    Architecture("densenet121", "DenseNet"),
    Architecture("vgg11_bn", "VGG", large=True),
    Architecture("ghostnet_050", "GhostNet"),
    Architecture("lcnet_035", "LCNet"),
    Architecture("hgnetv2_b0", "HGNet v2"),
    Architecture("starnet_s1", "StarNet"),
    Architecture("mambaout_femto", "MambaOut"),
)

SPREAD = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "resnet18", "convnext_atto")
"""Architectures that every objective goes the whole way with, also in CI."""


def config_of(architecture: Architecture, objective: str) -> RunConfig:
    """The objective's smoke config with another encoder."""
    smoke = load(f"configs/smoke/{objective}.yaml", RunConfig)
    data = smoke.data.model_copy(update={"image_size": architecture.size})
    return smoke.model_copy(update={"encoder": architecture.encoder, "data": data})


def build(config: RunConfig, encoder: nn.Module | None = None) -> Objective:
    """As a run of BATCH samples builds it, on the current device; `encoder`: where it was built before."""
    size = config.data.image_size
    assert isinstance(size, tuple)
    encoder = encoders.build(config.encoder, size) if encoder is None else encoder
    return config.objective.build(
        BuildContext(encoder, size, 10_000, BATCH, None, vocabulary=320, text_length=24)
    )


_MADE: dict[str, nn.Module] = {}
"""Encoders on the meta device by architecture: making one takes longer than deciding."""


def decide(architecture: Architecture, objective: str) -> str:
    """Empty where it works, else the line that `keel train` refuses it with before it starts."""
    try:
        config = config_of(architecture, objective)
        with torch.device("meta"):
            if architecture.name not in _MADE:
                _MADE[architecture.name] = encoders.build(config.encoder, architecture.size)
            build(config, copy.deepcopy(_MADE[architecture.name]))
    except UserError as error:
        return str(error)
    return ""


def rotated(architecture: Architecture) -> str:
    """One objective for each architecture, the same in every run and spread evenly: of those that work."""
    number = int(hashlib.sha256(architecture.name.encode()).hexdigest(), 16)
    order = [*OBJECTIVES[number % len(OBJECTIVES) :], *OBJECTIVES[: number % len(OBJECTIVES)]]
    return next(objective for objective in order if not decide(architecture, objective))


def step(config: RunConfig, seed: int = 0) -> Objective:
    """The objective after one update on random images.

    Raises AssertionError where a weight gets no gradient.
    """
    torch.manual_seed(seed)
    objective = build(config).train()
    views = [torch.randn(BATCH, view.channels, *view.size) for view in config.views(config.data.image_size)]  # type: ignore[arg-type]
    tokens = torch.randint(1, 200, (BATCH, 9))
    batch = Batch(tuple(views), torch.randint(0, 2**62, (BATCH,)), torch.arange(BATCH), tokens=tokens)
    if objective.needs_whole_share:
        batch = replace(batch, prepared=objective.before_step(batch, CLOCK))
    loss = objective(batch, CLOCK).loss
    assert loss.isfinite(), f"a loss of {float(loss)}"
    loss.backward()
    encoder = [(name, p) for name, p in objective.encoder.named_parameters() if p.requires_grad]
    still = [name for name, p in encoder if p.grad is None]
    assert not still, f"not trained: {', '.join(still[:5])}"
    torch.optim.SGD([p for group in objective.param_groups() for _, p in group.parameters], 1e-3).step()
    return objective.eval()


def export_cell(config: RunConfig, folder: Path) -> None:
    """Train one step, export, open again, compare; leaves beside it what a fresh process is to compute."""
    size = config.data.image_size
    assert isinstance(size, tuple)
    encoder = step(config).encoder
    view = evaluation_view(config.views(size)[0], config.encoder.crop)
    backbone = timm_folder.Backbone(encoder, config.encoder, view)
    timm_folder.write(backbone, folder)
    images = torch.randn(2, view.channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained = encoders.features(encoder, images)
        opened, shown = open_timm(str(folder))
        assert shown == view, f"shown {shown} where it was trained with {view}"
        assert (opened(images) - trained).abs().max() < TOLERANCE
    save_file({"images": images, "features": trained.contiguous()}, folder / "expected.safetensors")


def other_size(architecture: Architecture, folder: Path) -> str:
    """The export's weights in an encoder for another size: how it went, in a word or the refusal's line."""
    try:
        encoder = encoders.build(architecture.encoder, architecture.other)
        weights.load(encoder, str(folder))
    except UserError as error:
        return str(error)
    shape = (2, architecture.encoder.channels, *architecture.other)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = encoders.features(encoder.eval(), images)
        assert found.isfinite().all()
        if not encoders.has_image_size(architecture.name):  # the very same module takes any size
            assert (open_timm(str(folder))[0](images) - found).abs().max() < TOLERANCE
    return ""


_REOPEN = """
import json, sys, timm, torch
from safetensors.torch import load_file
found = {}
for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    with torch.no_grad():
        found[folder] = float((model(expected["images"]) - expected["features"]).abs().max())
ours = [n for n in sys.modules if n.split(".")[0] in ("configs", "data_pipeline", "pretrain", "launch")]
assert not ours, ours
print(json.dumps(found))
"""


def reopen_all(folders: Sequence[Path]) -> dict[Path, float]:
    """Largest difference of each export's features in one fresh process that imports nothing of keel."""
    if not folders:
        return {}
    command = [sys.executable, "-P", "-c", _REOPEN, *map(str, folders)]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {Path(folder): difference for folder, difference in found.items()}


def in_this_process() -> None:
    """Let `export.write` check an export here, at once; `reopen_all` does it in a fresh process for all."""
    from pretrain.encoders import reopen

    def reopened(folder: Path, images: Tensor, form: timm_folder.Format = "timm") -> dict[str, Tensor]:
        import timm

        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            return {"features": model(images), "tokens": reopen.tokens(model, images)}

    timm_folder._reopened = reopened


def run_cell(architecture: Architecture, objective: str, folder: Path) -> dict[str, Any]:
    """One row of the record; the export stays in `folder` where there is one."""
    started = time.perf_counter()
    row: dict[str, Any] = {"architecture": architecture.name, "objective": objective}
    row["refused"] = decide(architecture, objective)
    if not row["refused"]:
        try:
            export_cell(config_of(architecture, objective), folder)
            row["other_size"] = other_size(architecture, folder)
            row["whole"] = True
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def read(record: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The cells that have run."""
    if not record.exists():
        return {}
    rows = [json.loads(line) for line in record.read_text().splitlines() if line.endswith("}")]
    return {(row["architecture"], row["objective"]): row for row in rows}


def run(record: Path, cells: Iterable[tuple[Architecture, str]], minutes: float) -> None:
    """Run cells one by one; those of an architecture are opened in one fresh process."""
    record.parent.mkdir(parents=True, exist_ok=True)
    ends, known = time.monotonic() + 60 * minutes, read(record)
    by_name: dict[str, list[tuple[Architecture, str]]] = {}
    for architecture, objective in cells:
        row = known.get((architecture.name, objective), {})
        if not (row.get("whole") or row.get("refused")) or row.get("failed"):
            by_name.setdefault(architecture.name, []).append((architecture, objective))
    for name, own in by_name.items():
        if time.monotonic() > ends:
            print("time is over; the next call goes on")
            return
        with tempfile.TemporaryDirectory() as scratch:
            rows = [run_cell(a, o, Path(scratch) / o) for a, o in own]
            found = reopen_all([Path(scratch) / row["objective"] for row in rows if row.get("whole")])
            for row in rows:
                if row.get("whole"):
                    row["difference"] = found[Path(scratch) / row["objective"]]
                    if not row["difference"] < TOLERANCE:
                        row["failed"] = f"a fresh process differs by {row['difference']:.1e}"
        with record.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(name, *(f"{row['objective']} {_word(row)}" for row in rows), flush=True)


def _word(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "·"
    if row.get("failed"):
        return "FAILED"
    return "no" if row["refused"] else "✓" if row.get("whole") else "○"


def table(known: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """docs/backbones.md."""
    lines = [_HEAD]
    lines.append("| architecture | what it is | " + " | ".join(OBJECTIVES) + " | at another size |")
    lines.append("|---|---|" + "---|" * (len(OBJECTIVES) + 1))
    reasons: dict[str, list[str]] = {}
    for a in ARCHITECTURES:
        rows = {o: known.get((a.name, o)) for o in OBJECTIVES}
        words = []
        for objective, row in rows.items():
            words.append(_word(row))
            if row is not None and row["refused"]:
                reasons.setdefault(row["refused"], []).append(f"{a.name} with {objective}")
        sizes = {row["other_size"] for row in rows.values() if row is not None and "other_size" in row}
        other = "" if not sizes else "✓" if sizes == {""} else "its weights are for one size"
        lines.append(f"| `{a.name}` | {a.kind} | {' | '.join(words)} | {other} |")
    lines += ["", "## What is refused, and how", ""]
    lines += [f"- {', '.join(cells)}: `{reason}`" for reason, cells in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


_HEAD = (Path(__file__).with_name("backbones_head.md")).read_text()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--decide", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--record", type=Path, default=RECORD)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    in_this_process()
    cells = [(a, o) for a in ARCHITECTURES for o in OBJECTIVES]
    cells = [
        c
        for c in cells
        if all(word in f"{c[0].name} {c[1]}".split() or word in c[0].name for word in chosen.only)
    ]
    if chosen.decide:
        chosen.record.parent.mkdir(parents=True, exist_ok=True)
        known = read(chosen.record)
        with chosen.record.open("a") as file:
            for a, o in cells:
                if (a.name, o) not in known:
                    row = {"architecture": a.name, "objective": o, "refused": decide(a, o)}
                    file.write(json.dumps(row) + "\n")
    elif not chosen.table:
        run(chosen.record, cells, chosen.minutes)
    PAGE.write_text(table(read(chosen.record)))


if __name__ == "__main__":
    main()
