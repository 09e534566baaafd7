"""Figures of what runs log: losses against steps, tokens and time, and other quantities by step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.figure import Figure

from flashmhf.reports.lines import Against, Frame, Line, draw_lines, known

Captioned = tuple[Figure, str]
AGAINST_NAMES: dict[Against, str] = {"steps": "step", "tokens": "tokens read", "time": "time in training"}
HEIGHT = 2.4  # in inches
MAX_IN_LEGEND = 4  # lines of a small figure that has a legend
SETTLED = 0.1  # of a run, after which losses fall slowly
MIN_POINTS = 30  # of a curve that is also drawn from there on
MIN_CHANGE = 0.02  # of the largest value; less is a number, not a curve


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What to draw of a log: its name there, how much to multiply it by, the y axis, the caption."""

    name: str
    factor: float = 1.0
    label: str
    caption: str


QUANTITIES = (
    Quantity(name="tokens_per_second", label="tokens/s", caption="Throughput, without validation and saving"),
    Quantity(name="grad_norm", label="gradient norm", caption="Gradient norm before clipping"),
    Quantity(name="learning_rate", label="learning rate", caption="Learning rate"),
    Quantity(name="memory_mib", label="MiB", caption="Peak memory so far, of the current process"),
    Quantity(name="data_wait_share", factor=100, label="% of the time", caption="Waiting for data"),
    Quantity(name="model_flops_utilisation", factor=100, label="% of the peak", caption="Model FLOPs utilisation"),
)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Losses to draw.

    Attributes:
        name, note: the caption; the x axis is between them.
        levels: named horizontal lines.
        whole: not only the later part of the run.
    """

    lines: Sequence[Line]
    name: str
    note: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    whole: bool = True


def losses_against(charts: Iterable[Chart], restarts: Sequence[float] = ()) -> dict[str, list[Captioned]]:
    """For steps, tokens and time: a figure of each chart that has a line with two points. `restarts` are steps."""
    found: dict[str, list[Captioned]] = {}
    for chart in charts:
        points = max((len(trace.values) for line in chart.lines for trace in line.traces), default=0)
        for what in known(chart.lines) if points > 1 else ():
            frame = Frame(
                label="nats/token",
                levels=chart.levels,
                marks=restarts if what == "steps" else (),
                whole=chart.whole,
            )
            figure = draw_lines(chart.lines, what, frame)
            found.setdefault(what, []).append((figure, f"{chart.name} by {AGAINST_NAMES[what]}{chart.note}"))
    return found


def settled(chart: Chart) -> list[Chart]:
    """The same without the beginning, where losses fall too far to share a scale; nothing for few points."""
    steps = max((trace.steps for line in chart.lines for trace in line.traces), key=len, default=())
    if len(steps) < MIN_POINTS:
        return []
    begin = steps[int(SETTLED * len(steps))]
    lines = []
    for line in chart.lines:
        traces = [trace.since(begin) for trace in line.traces]
        if kept := tuple(trace for trace in traces if trace.values):
            lines.append(replace(line, traces=kept))
    return [Chart(lines=lines, name=chart.name, note=f" from step {begin:,.0f} on{chart.note}", whole=False)]


def by_step(quantity: Quantity, lines: Sequence[Line]) -> Captioned | None:
    """A small figure; None if there is no change to see."""
    values = [value for line in lines for trace in line.traces for value in trace.values]
    if not values or max(values) - min(values) <= MIN_CHANGE * max(map(abs, values)):
        return None
    few = len(lines) <= MAX_IN_LEGEND
    frame = Frame(label=quantity.label, height=HEIGHT, from_zero=min(values) >= 0, legend=few)
    return draw_lines(lines, "steps", frame), quantity.caption + ("" if few else "; colours as in the losses")
