"""The learning rate as a function of the plan and the step: there is no scheduler state to lose.

The same factors as `transformers.get_scheduler` for `linear`, `cosine`, `constant` and `constant_with_warmup`,
which a test compares; the worker has no transformers.
"""

import math

from cola_common.messages import OptimizerPlan


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Steps of warm-up, rounded up as in transformers' Trainer."""
    return math.ceil(total_steps * warmup_ratio)


def learning_rate(plan: OptimizerPlan, step: int) -> float:
    """The rate of step `step`, 0 for the first."""
    if plan.lr_scheduler_type == "constant":
        return plan.learning_rate
    if step < plan.warmup_steps:
        return plan.learning_rate * step / max(1, plan.warmup_steps)
    if plan.lr_scheduler_type == "constant_with_warmup":
        return plan.learning_rate
    after = max(1, plan.total_steps - plan.warmup_steps)
    if plan.lr_scheduler_type == "linear":
        return plan.learning_rate * max(0.0, (plan.total_steps - step) / after)
    assert plan.lr_scheduler_type == "cosine"
    return plan.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - plan.warmup_steps) / after)))
