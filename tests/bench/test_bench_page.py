"""The page of a benchmark: what it shows, and that it loads nothing."""

import dataclasses
import re

from ssmc.runtime.bench import findings
from ssmc.runtime.bench.html import render
from tests.support.benches import Page


def test_the_page_says_how_a_model_was_compressed_and_nothing_of_defaults(report):
    recipe = {"pattern": "column", "sparsity": {"column": 0.5}, "score": None, "repair": True}
    text = render(
        dataclasses.replace(report, models=(report.dense, dataclasses.replace(report.models[1], recipe=recipe)))
    )
    assert "pattern column, sparsity 0.5 of column, repair yes" in text
    assert "None" not in text


def test_the_page_loads_nothing_and_shows_everything(report, artefact):
    report.write(artefact)
    text = (artefact / "bench.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|@import|//[a-z]+\.", text)
    assert all(re.match(r"url\(#", found) for found in re.findall(r"url\([^)]?", text))
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(link.startswith("#") for link in links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in links} | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert page.headings == [
        "Summary",
        "Notes",
        "Dense model and compressed models",
        "Sequences in memory, counted",
        "Time of a prefill",
        "Time of a step of decoding",
        "Time of the scan alone",
        "Time of the parts of the first layer",
        "Tokens per second",
        "Sizes",
        "Memory",
        "Sequences in memory, measured",
        "Perplexity",
        "Recall: loss by kind of token, in nats",
        "Stock transformers: time of a prefill",
        "Conditions",
    ]
    assert page.tags.count("svg") == 4
    assert "#0304" not in text  # every colour of a plot became one of the page's
    shown = "".join(page.texts)
    assert f"{report.dense.parameters:,}" in shown
    assert report.conditions.cpu in shown
    for sentence in (*findings(report), *report.notes):
        assert sentence in shown
    assert str(artefact.parent) not in text


def test_markup_in_a_name_stays_text(report):
    evil = "<script>alert(1)</script>$x$"
    models = (dataclasses.replace(report.dense, name=evil), report.models[1])
    measurements = tuple(
        dataclasses.replace(m, timings={evil if k == report.dense.name else k: t for k, t in m.timings.items()})
        for m in report.measurements
    )
    page = Page(render(dataclasses.replace(report, models=models, measurements=measurements)))
    assert "script" not in page.tags
    assert evil in "".join(page.texts)
