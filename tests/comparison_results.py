"""A comparison's result, made up, and a page's text."""

import html.parser

from flashmhf.comparison.results import (
    ComparisonResult,
    Curve,
    Differences,
    DocumentsResult,
    GateUsage,
    RunResult,
    Samples,
    Spread,
    SweepResult,
    VariantResult,
)
from flashmhf.comparison.settings import Comparison
from flashmhf.comparison.verdict import Verdict
from flashmhf.data.config import DataConfig
from flashmhf.evaluation.differences import Difference
from flashmhf.training.config import TrainConfig

SEEDS = (0, 1, 2)


def spread(*values: float) -> Spread:
    return Spread(mean=sum(values) / len(values), standard_deviation=0.01 if len(values) > 1 else None, values=values)


def differences(mean: float, low: float, high: float, baseline: str = "swiglu", **verdict) -> Differences:
    def difference(measure: str) -> Difference:
        return Difference(
            measure=measure,
            mean=mean,
            by_run=(mean - 0.015, mean, mean + 0.015),
            interval=(low, high),
            document_error=0.01,
            documents=5,
        )

    outcome = "undecided" if low <= 0 <= high else "better" if high < 0 else "worse"
    values = {"outcome": outcome, "seeds": 3, "seeds_needed": None, "more_documents": False, "resolution": 0.015}
    return Differences(
        baseline=baseline,
        nats_per_token=difference("nats_per_token"),
        bits_per_byte=difference("bits_per_byte"),
        verdict=Verdict(**(values | verdict)),
    )


def variant_result(name: str, loss: float) -> VariantResult:
    return VariantResult(
        variant=name,
        ffn_type=name,
        model="flashmhf-tiny",
        ablation=None,
        parameters=1234567,
        forward_flops_per_token=7.7e6,
        layers=4,
        intermediate_size=576,
        learning_rate=None,
        failed_seeds=(),
        validation_loss=spread(loss, loss + 0.02),
        bits_per_byte=spread(loss * 1.44, loss * 1.45),
        tokens_per_second=spread(4321.0),
        peak_memory_mib=spread(888.0),
        elapsed_s=spread(60.0),
        documents=DocumentsResult(nats_per_token=spread(loss + 0.1, loss + 0.1), number=5),
        difference=None if name == "swiglu" else differences(-0.1, -0.15, -0.05),
        effect=None,
    )


def run_result(name: str, seed: int, loss: float) -> RunResult:
    steps = tuple(range(1, 101, 10))
    return RunResult(
        variant=name,
        ffn_type=name,
        model="flashmhf-tiny",
        seed=seed,
        learning_rate=None,
        folder=f"{name}-seed{seed}",
        status="finished",
        steps=100,
        tokens=409600,
        curve=Curve(
            steps=steps, losses=tuple(5.0 - step / 50 for step in steps), elapsed_s=tuple(step * 0.5 for step in steps)
        ),
        validation_curve=Curve(steps=(50, 100), losses=(3.0, loss), elapsed_s=(25.0, 50.0)),
    )


def result(**changes) -> ComparisonResult:
    """A comparison of two layers with three seeds."""
    data = DataConfig(source="<script>alert(1)</script>", context_length=512)
    values = {
        "settings": Comparison(
            variants=("swiglu", "flashmhf"),
            models=("flashmhf-tiny",),
            train=TrainConfig(model="", data=data),
            seeds=SEEDS,
        ),
        "jobs": 2,
        "unigram_entropy_nats": 3.2,
        "sweep": (SweepResult(variant="swiglu", seed=0, learning_rate=1e-3, validation_loss=1.7, chosen=True),),
        "variants": (variant_result("swiglu", 1.7), variant_result("flashmhf", 1.6)),
        "gates": {"swiglu": (), "flashmhf": (GateUsage(layer=0, head=0, entropy=0.875, load=0.99),)},
        "runs": tuple(run_result(n, s, loss) for n, loss in (("swiglu", 1.7), ("flashmhf", 1.6)) for s in SEEDS),
        "samples": Samples(prompt="def <b>", continuations={"swiglu": "x & y", "flashmhf": "</pre>z"}),
    }
    return ComparisonResult(**(values | changes))


class Collector(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data
