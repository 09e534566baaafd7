"""Colours of figures."""

from flashmhf.reports.style import colours_of


def test_lines_of_a_figure_have_different_colours():
    names = ["flashmhf-compiled", "swiglu", "flashmhf", "swiglu-tiny", "chunked", "naive"]
    assert len(set(colours_of(names))) == len(names)


def test_a_model_has_the_colour_of_its_layer():
    assert colours_of(["swiglu-tiny", "flashmhf-tiny"]) == colours_of(["swiglu", "flashmhf"])
