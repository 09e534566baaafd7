"""What rates of their own for some matrices are worth, under Muon: pairs of settings in recipe_runs.py's rows."""

from dataclasses import replace

from recipe_changes import SWIGLU, TWO_HEADS, Change, Values, rates

HALF = replace(SWIGLU, row_rate=0.5)  # what `train` does
NARROW = replace(SWIGLU, width=128)


def both(text: str, values: Values) -> Change:
    return Change(text=text, swiglu=(HALF, values), flashmhf=(TWO_HEADS, values))


EMBEDDINGS = "AdamW's rate of the embeddings 0.004 -> {}"
ROWS = "rate of K and U (gate_proj and up_proj) times {}"
RATES = [
    Change(text=ROWS.format(0.354), swiglu=(SWIGLU, {"row_rate": 0.354})),
    *(
        Change(
            text=ROWS.format(factor),
            swiglu=(SWIGLU, {"row_rate": factor}),
            flashmhf=(TWO_HEADS, {"row_rate": factor}),
        )
        for factor in (0.5, 0.707)
    ),
    Change(text=ROWS.format(1.41), flashmhf=(TWO_HEADS, {"row_rate": 1.41})),
    Change(text=ROWS.format(2), swiglu=(SWIGLU, {"row_rate": 2.0})),
    *(
        Change(text=f"... at width 128, times {factor}", swiglu=(NARROW, {"row_rate": factor}))
        for factor in (0.5, 0.707)
    ),
    Change(text="... with one head of 256, times 0.5", flashmhf=(replace(TWO_HEADS, heads=1), {"row_rate": 0.5})),
    Change(text="... with four heads of 64, times 0.5", flashmhf=(replace(TWO_HEADS, heads=4), {"row_rate": 0.5})),
    Change(
        text="... without the gate, times 0.577",
        flashmhf=(replace(TWO_HEADS, gate=None, gate_scale=None), {"row_rate": 0.577}),
    ),
    Change(
        text="... with 12 sub-networks of 48, times 2",
        flashmhf=(replace(TWO_HEADS, subnetworks=12), {"row_rate": 2.0}),
    ),
    *(both(f"rate of V (down_proj) times {factor}", {"value_rate": factor}) for factor in (0.5, 2.0)),
    *(both(f"rate of attention's matrices times {factor}", {"attention_rate": factor}) for factor in (0.5, 2.0)),
    *(
        Change(
            text=f"rate of W_in and W_out times {factor}",
            flashmhf=(TWO_HEADS, {"in_rate": factor, "out_rate": factor}),
        )
        for factor in (0.5, 2.0)
    ),
    *(Change(text=f"rate of W_in times {factor}", flashmhf=(TWO_HEADS, {"in_rate": factor})) for factor in (0.5, 2.0)),
    Change(text="rate of W_out times 0.5", flashmhf=(TWO_HEADS, {"out_rate": 0.5})),
    Change(text="rate of W_in, K and U times 0.5", flashmhf=(TWO_HEADS, {"in_rate": 0.5, "row_rate": 0.5})),
    *(both(f"all rates 0.004 -> {rate}", rates(rate)) for rate in (0.0028, 0.0056)),
    *(
        Change(
            text=f"all rates 0.004 -> {rate}, K and U half of that",
            flashmhf=(TWO_HEADS, {"row_rate": 0.5, **rates(rate)}),
        )
        for rate in (0.0056, 0.008)
    ),
    both("warm-up 10 % -> 2 %", {"warmup": 0.02}),
    Change(text=EMBEDDINGS.format(0.002), swiglu=(HALF, {"embedding_learning_rate": 0.002})),
    both(EMBEDDINGS.format(0.008), {"embedding_learning_rate": 0.008}),
    Change(text="embeddings of std 0.02 -> 0.05", swiglu=(HALF, {"embedding_std": 0.05})),
    Change(text="embeddings not tied", swiglu=(HALF, {"tied": False})),
    Change(text="AdamW's rate of the gate 0.004 -> 0.001", flashmhf=(TWO_HEADS, {"gate_learning_rate": 0.001})),
    *(Change(text=f"W_in's gain 1 -> {gain}", flashmhf=(TWO_HEADS, {"in_gain": gain})) for gain in (0.5, 2.0)),
    Change(text="V's gain 0.3 -> 0.5", flashmhf=(TWO_HEADS, {"output_gain": 0.5})),
    Change(text="W_out's gain 0.3 -> 0.5", flashmhf=(TWO_HEADS, {"out_gain": 0.5})),
    Change(text="scores of RMS 0.64 -> 1", flashmhf=(TWO_HEADS, {"score_rms": 1.0})),
    Change(text="weight decay 0.1 -> 0.3", flashmhf=(TWO_HEADS, {"weight_decay": 0.3})),
]
