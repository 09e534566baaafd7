"""Draws the pipelines of the Hopper kernels: `python benchmarks/draw_pipeline.py` writes docs/pipeline.png.

A model, not a measurement: products run one at a time at the tensor cores' full rate (head dim 128, 2,048 multiply-adds
per clock); activations and loads take round numbers of clocks.
"""

from dataclasses import dataclass, field
from pathlib import Path

from flashmhf.reports.render import png
from flashmhf.reports.style import new_figure
from flashmhf.reports.ticks import plain_ticks

FILE = Path(__file__).parents[1] / "docs/pipeline.png"
ACTIVATE, LOAD, ADD = 320, 400, 200  # clocks
COLOURS = {"load": "#9ecae1", "scores": "#3182bd", "activate": "#fdae6b", "sum": "#31a354"}
TENSOR_CORES = "tensor cores"


@dataclass(eq=False)
class Step:
    """One bar. It starts once all of `after` have ended and its lane is free."""

    lane: str
    kind: str
    label: str
    clocks: int
    after: list["Step"] = field(default_factory=list)
    start: int = -1

    @property
    def end(self) -> int:
        return self.start + self.clocks


def schedule(steps: list[Step]) -> None:
    """Sets start times: earliest step first, one step at a time per lane."""
    free: dict[str, int] = {}
    waiting = list(steps)

    def earliest(step: Step) -> int:
        return max([free.get(step.lane, 0), *(before.end for before in step.after)])

    while waiting:
        step = min((s for s in waiting if all(before.start >= 0 for before in s.after)), key=earliest)
        waiting.remove(step)
        step.start = earliest(step)
        free[step.lane] = step.end


def forward(tiles: int, stages: int) -> list[Step]:
    """Two warpgroups of 64 tokens, 64 rows per tile: S 512 clocks, P V 256."""
    steps: list[Step] = []
    last: dict[tuple[str, int, int], Step] = {}

    def add(kind: str, group: int, i: int, lane: str, label: str, clocks: int, *after: Step | None) -> None:
        step = Step(lane, kind, label, clocks, [s for s in after if s is not None])
        last[label[:1], group, i] = step
        steps.append(step)

    for i in range(tiles):
        read = [last.get((what, group, i - stages)) for what in "SO" for group in (0, 1)]
        add("load", 2, i, "producer: TMA", f"K U V {i}", LOAD, *read)
    for i in range(tiles):
        for group, name in enumerate("AB"):
            loaded, before = last["K", 2, i], last.get(("P", group, i - 1))
            add("scores", group, i, TENSOR_CORES, f"S{name} {i}", 512, loaded, before)
            if before is not None:
                add("sum", group, i - 1, TENSOR_CORES, f"O{name} {i - 1}", 256, before, last["S", group, i])
            add("activate", group, i, f"warpgroup {name}", f"P{name} {i}", ACTIVATE, last["S", group, i])
    for group, name in enumerate("AB"):
        add("sum", group, tiles - 1, TENSOR_CORES, f"O{name} {tiles - 1}", 256, last["P", group, tiles - 1])
    return steps


def backward(tiles: int, stages: int) -> list[Step]:
    """Both warpgroups on one tile of 128 tokens and 64 rows: S and dA 1,536 clocks, dQ 1,024, dV, dK and dU 1,536."""
    steps: list[Step] = []
    weights: list[Step] = []
    added: Step | None = None
    activated: Step | None = None
    for i in range(tiles):
        room = [weights[i - stages]] if i >= stages else []
        loaded = Step("producer: Q, dO", "load", f"{i}", LOAD, room)
        scores = Step(TENSOR_CORES, "scores", f"S dA {i}", 1536, [loaded, *([added] if added else [])])
        steps += [loaded, scores]
        before = scores
        if activated is not None:
            before = Step(TENSOR_CORES, "sum", f"dV dK dU {i - 1}", 1536, [scores, activated])
            weights.append(before)
            steps.append(before)
        activated = Step("warpgroups A, B", "activate", f"P dM dN {i}", 900, [scores])
        dq = Step(TENSOR_CORES, "sum", f"dQ {i}", 1024, [activated, before])
        added = Step("dQ to memory", "load", f"{i}", ADD, [dq])
        steps += [activated, dq, added]
    assert added is not None
    steps.append(Step(TENSOR_CORES, "sum", f"dV dK dU {tiles - 1}", 1536, [added]))
    return steps


def draw(axis, title: str, steps: list[Step]) -> None:
    schedule(steps)
    lanes = list(dict.fromkeys(step.lane for step in steps))
    for step in steps:
        y = -lanes.index(step.lane)
        axis.broken_barh([(step.start, step.clocks)], (y - 0.4, 0.8), color=COLOURS[step.kind], edgecolor="white")
        axis.text(step.start + step.clocks / 2, y, step.label, ha="center", va="center", fontsize=6.5)
    axis.set(title=title, xlabel="clocks (model)", yticks=[-i for i in range(len(lanes))], yticklabels=lanes)
    axis.title.set_fontsize(10)
    plain_ticks(axis.xaxis)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def main() -> None:
    figure = new_figure(13, 6)
    axes = figure.subplots(2, 1)
    draw(axes[0], "Forward: S of the next tile is issued before O of this one; A and B activate in turn", forward(5, 4))
    draw(axes[1], "Backward: dV, dK and dU of a tile run while the next one is activated", backward(4, 2))
    FILE.write_bytes(png(figure, dpi=130))


if __name__ == "__main__":
    main()
