"""The layers and adapters of docs/design.md, by the contracts in pyproject.toml, and proof that they bite."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data_pipeline", "pretrain", "launch")
ENGINES = frozenset({"deepspeed", "accelerate", "webdataset", "wandb", "submitit", "timm"})


def contracts(root: Path) -> subprocess.CompletedProcess[str]:
    """The checks run in a process of their own, on the tree in `root`."""
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}", "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_every_contract_is_kept() -> None:
    checked = contracts(ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        (
            "data_pipeline/types.py",
            "import pretrain.objective",
            "launch -> pretrain -> data_pipeline -> configs",
        ),
        ("pretrain/objective.py", "import pretrain.losses", "Inside pretrain"),
        ("pretrain/trainer.py", "import pretrain.engines.deepspeed", "The loop knows"),
        ("configs/errors.py", "import configs.loading", "No circle"),
        ("pretrain/trainer.py", "import deepspeed", "deepspeed and accelerate stay"),
        ("pretrain/tracking/jsonl.py", "def late():\n    import wandb", "wandb stays"),
        ("data_pipeline/types.py", "import webdataset", "webdataset stays"),
        ("pretrain/objectives/other.py", "import pretrain.objectives.mae", "An objective knows no other"),
        ("pretrain/brand_new.py", "", "Inside pretrain"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, file: str, line: str, named: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    checked = contracts(tmp_path)
    broken = [found for found in checked.stdout.splitlines() if found.endswith(" BROKEN")]
    assert checked.returncode == 1, checked.stdout
    assert any(found.startswith(named) for found in broken), checked.stdout


def test_no_engine_is_imported_by_its_name_as_text() -> None:
    """The contracts see import statements only."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                    called = ast.unparse(node.func).rpartition(".")[2]
                    name = str(node.args[0].value).partition(".")[0]
                    assert not (called in ("import_module", "__import__") and name in ENGINES), path
