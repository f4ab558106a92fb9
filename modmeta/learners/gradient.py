"""GradientLearner: MAML and its family, put together from parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from modmeta.adaptation.descent import STEP_RULES, Weights, descend
from modmeta.adapters import UnitConfig
from modmeta.adapters.adapted import bind
from modmeta.backbone import second_order_safe
from modmeta.data import Episode
from modmeta.errors import ModmetaError, refuse_outside
from modmeta.learners.source import BackboneConfig, SourceConfig
from modmeta.learners.task_loss import WEIGHT, TaskLossLearner


class GradientLearner(TaskLossLearner):
    """Learns initial values from which a few steps of plain gradient descent on a support set end well.

    The initial values of all units and of a linear head are meta-learned; ``adapted`` says which of them the steps
    move. With ``full`` unscaled on every layer of a random backbone, what is learned is the whole network, and

    * all adapted: MAML; first order: FOMAML (Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
      Networks", ICML 2017);
    * only the head: ANIL (Raghu et al., "Rapid Learning or Feature Reuse?", ICLR 2020);
    * all but the head: BOIL (Oh et al., "BOIL: Towards Representation Change for Few-shot Learning", ICLR 2021);
    * the head starts from zero: the zeroing trick (Kao et al., "MAML is a Noisy Contrastive Learner in
      Classification", ICLR 2022). One learned row for all labels, as UNICORN-MAML has it (Ye and Chao, "How to Train
      Your MAML to Excel in Few-Shot Classification", ICLR 2022), is the same: a softmax sees differences alone;
    * the head starts from class means: Proto-MAML (Triantafillou et al., "Meta-Dataset", ICLR 2020);
    * rates are learned per parameter: Meta-SGD; per tensor and step, with a loss after every step: MAML++; made by a
      network from what it sees: ALFA. See :mod:`modmeta.adaptation.descent`.

    MAML++'s statistics per step have no place here: :mod:`~modmeta.backbone.four_block` keeps none. Other units on a
    frozen pretrained backbone make this meta-learned fine-tuning of few parameters.

    Args:
        backbone: the timm model that all domains share.
        units: adapter modules and where they act; what a policy would start from (gate, rate) has no effect.
        head: ``linear``, whose initial weights are learned, one row per label; ``zero``, which starts from none; or
            ``prototype``, which starts from the support's class means. The last two take any number of classes.
        ways: classes per episode that a linear head tells apart.
        adapted: globs of unit names, and the word ``head``: what the steps move.
        rule: registered step rule.
        rate: learning rate of the steps, or where learned ones start.
        steps: gradient steps in training.
        test_steps: gradient steps in validation and test; None takes as many.
        order: 2 differentiates through the steps' gradients, 1 takes these as constants.
        multi_step_epochs: first epochs in which the query loss after every step counts, the last one ever more.
        execution: registered execution backend.
        execution_options: its options.
        source: source training; off by default.
        learning_rate: of Adam on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on features under the learned initial values.
        source_images: images per class and domain that the source statistics are measured on, if ever.
        cache_dir: where frozen features are kept; None keeps them in memory.

    Raises:
        ModmetaError: for settings that make no sense, alone or together.
    """

    largest_gradient = 10.0

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig] = (),
        head: Literal["linear", "zero", "prototype"] = "linear",
        ways: int = 5,
        adapted: Sequence[str] = ("*",),
        rule: str = "constant",
        rate: float = 0.1,
        steps: int = 1,
        test_steps: int | None = None,
        order: Literal[1, 2] = 2,
        multi_step_epochs: int = 0,
        execution: str = "loop",
        execution_options: dict[str, Any] | None = None,
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            backbone, units, head, ways, adapted, rate, steps, test_steps, execution, execution_options, source,
            learning_rate, baselines, source_images, cache_dir,
        )  # fmt: skip
        if order not in (1, 2):
            raise ModmetaError(f"order must be 1 or 2, got {order}")
        refuse_outside({"multi_step_epochs": multi_step_epochs}, 0)
        if multi_step_epochs and steps == 1:
            raise ModmetaError("multi_step_epochs weighs the losses after several steps; set steps to 2 or more")
        if rule == "meta_sgd" and self.linear is None and WEIGHT in self.moving:
            raise ModmetaError(
                f"rule meta_sgd learns a rate per parameter, and a {head} head has none that outlast an episode; "
                f"take rule lslr, or head linear"
            )
        self.order = order
        self.multi_step_epochs = multi_step_epochs
        self.rule = STEP_RULES.make(rule, self.moving, rate, steps)
        if not self.meta_parameters():
            raise ModmetaError("nothing would be learned; add units, take head linear, or a rule that learns rates")
        self._cut = self.model.cut_before(self._moving_units)

    def task_loss(self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor]) -> Tensor:
        """Return the query loss after the steps on the support; of all steps, weighted, where the task has weights."""
        _, path = self.descend(parameters, task, self.steps, second_order=self.order == 2)
        if "step_weights" not in task:
            return self._query_loss(path[-1], task)
        return (torch.stack([self._query_loss(weights, task) for weights in path]) * task["step_weights"]).sum()

    def descend(
        self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor], steps: int, second_order: bool = False
    ) -> tuple[Weights, list[Weights]]:
        """Return all weights before the steps on the support, and after each; with their gradients' graph or not."""
        with second_order_safe() if second_order else nullcontext():
            # What lies before everything that moves is the same in all steps.
            hidden = task["support"]
            if self._cut is not None:
                hidden = self.weighted_features(self.initial_units(parameters), hidden, stop=self._cut)
            start = self.initial(parameters, task, hidden, self._cut)
            hidden = hidden if second_order else hidden.detach()

            def loss(leaves: Weights, step: int) -> Tensor:
                logits = self.weighted_logits(start | leaves, hidden, self._cut)
                return self.support_loss(logits, task["support_labels"])

            rates = {name.removeprefix("rule."): p for name, p in parameters.items() if name.startswith("rule.")}
            moving = {name: start[name] for name in self.moving}
            path = descend(moving, loss, bind(self.rule, rates), steps, second_order)
        return start, [start | weights for weights in path]

    def task(self, episode: Episode) -> dict[str, Tensor]:
        """Return the tensors of a training episode; in the first epochs, the weights of the steps' losses too."""
        task, epoch = super().task(episode), max(self.current_epoch - self.source_epochs, 0)
        if epoch >= self.multi_step_epochs:
            return task
        weights = step_weights(self.steps, epoch / self.multi_step_epochs)
        return task | {"step_weights": weights.to(self.head.log_scale)}

    def _query_loss(self, weights: Weights, task: Mapping[str, Tensor]) -> Tensor:
        return self.query_loss(self.weighted_logits(weights, task["query"]), task["query_labels"])


def step_weights(steps: int, progress: float) -> Tensor:
    """Return the weights ``(steps,)``, float64, of the query losses after every step, summing to 1.

    Equal at first; all but the last fall linearly, never below 0.03 / steps. Antoniou et al., "How to train your MAML",
    ICLR 2019.

    Args:
        steps: number of steps.
        progress: from 0 to 1.
    """
    early = max(1.0 - progress, 0.03) / steps
    return torch.tensor([early] * (steps - 1) + [1 - early * (steps - 1)], dtype=torch.double)
