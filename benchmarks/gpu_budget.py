"""How many seeds and tokens of the training comparison fit a time limit.

python benchmarks/gpu_budget.py     prints the estimates of benchmarks/README.md
"""

import math
from dataclasses import dataclass

from flashmhf.ops.roofline import GPUS
from flashmhf.reports.table import Table
from gpu_plan import PLANS, Step
from gpu_sizes import CONTENDERS, SIZES, cost_of, parameters_of

TOKENS_PER_PARAMETER = 3.75  # without embeddings: 100 M tokens for the largest size
MIN_TOKENS_PER_PARAMETER = 0.5
MIN_SEEDS, MAX_SEEDS = 3, 10  # fewer seeds give no verdict
MARGIN = 0.9  # of the time: validation and rows cost some, too
ASSUMED_START_S = 5.0  # of a run, in the estimates of the README


@dataclass(frozen=True, kw_only=True)
class PairCost:
    """Seconds that both contenders of one size take together, for one seed: start_s + tokens x s_per_token."""

    parameters: int
    start_s: float
    s_per_token: float

    def seconds(self, tokens_per_parameter: float) -> float:
        return self.start_s + tokens_per_parameter * self.parameters * self.s_per_token


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What fits: the same tokens per parameter at every size, and this many seeds of all sizes."""

    tokens_per_parameter: float
    seeds: int


def fit_budget(seconds: float, costs: list[PairCost]) -> Budget:
    """All tokens and as many seeds as fit; if MIN_SEEDS do not, fewer tokens; then fewer seeds.

    `seeds` is 0 if not even one seed with the fewest tokens fits.
    """
    usable = MARGIN * seconds
    seeds = seeds_that_fit(seconds, costs, TOKENS_PER_PARAMETER)
    if seeds >= MIN_SEEDS:
        return Budget(tokens_per_parameter=TOKENS_PER_PARAMETER, seeds=seeds)
    for seeds in range(MIN_SEEDS, 0, -1):
        start_s = sum(cost.start_s for cost in costs)
        of_training = sum(cost.parameters * cost.s_per_token for cost in costs)
        fitting = min((usable / seeds - start_s) / of_training, TOKENS_PER_PARAMETER)
        if fitting >= MIN_TOKENS_PER_PARAMETER:
            return Budget(tokens_per_parameter=fitting, seeds=seeds)
    return Budget(tokens_per_parameter=MIN_TOKENS_PER_PARAMETER, seeds=0)


def seeds_that_fit(seconds: float, costs: list[PairCost], tokens_per_parameter: float) -> int:
    """How many seeds of all sizes fit, at most MAX_SEEDS."""
    per_seed = sum(cost.seconds(tokens_per_parameter) for cost in costs)
    return min(MAX_SEEDS, math.floor(MARGIN * seconds / per_seed))


def estimate(step: Step, share_of_peak: float, gpu: str = "h100") -> Budget:
    """What would fit a step at this share of a GPU's peak throughput, for both contenders and every size."""
    flops_per_s = share_of_peak * GPUS[gpu].tflops_16bit * 1e12
    costs = []
    for name in step.options["sizes"]:
        flops = sum(cost_of(SIZES[name], contender).training_flops_per_token for contender in CONTENDERS)
        costs.append(
            PairCost(
                parameters=parameters_of(SIZES[name]),
                start_s=len(CONTENDERS) * ASSUMED_START_S,
                s_per_token=flops / flops_per_s,
            )
        )
    return fit_budget(step.limit_s, costs)


def table() -> str:
    """Estimates for the plans that train pairs."""
    records = []
    for plan in ("third", "scaling"):
        step = next(step for step in PLANS[plan].steps if step.name == "pairs")
        largest = parameters_of(SIZES[step.options["sizes"][-1]])
        for share in (0.1, 0.2, 0.3, 0.4):
            budget = estimate(step, share)
            records.append(
                {
                    "plan": plan,
                    "share of peak": f"{share:.0%}",
                    "seeds of both": budget.seeds,
                    "tokens per parameter": round(budget.tokens_per_parameter, 2),
                    "M tokens of the largest model": round(budget.tokens_per_parameter * largest / 1e6),
                }
            )
    return Table.of(records).markdown()


if __name__ == "__main__":
    print(table())
