"""The objective's own measures on images it was not trained on, averaged over a whole set.

What is measured is the objective's business (`Objective.judge`): masked reconstruction, for example, compares
its error with that of predicting the mean patch.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Subject, mean_over_set
from pretrain.ports import Scores


class HeldOutConfig(EvaluatorConfig):
    """`data` needs no labels here; a folder with `val/manifest.json` stands for that manifest."""

    kind: str = "heldout"

    def build(self) -> Evaluator:
        return HeldOut(self)


@dataclass(frozen=True)
class HeldOut:
    config: HeldOutConfig

    def __call__(self, subject: Subject) -> Scores:
        if subject.objective is None:
            raise ConfigError(f"evaluate.{self.config.title}: an encoder alone has no objective; judge a run")
        *_, manifest = self.config.manifests()
        return Scores(self.config.title, mean_over_set(subject, manifest, subject.objective.judge))
