"""Sequences in memory, as a benchmark counts them."""

from ssmc.runtime.bench import findings, summary_rows


def test_the_report_counts_sequences_first(report):
    rows = summary_rows(report)
    assert rows[0].metric == "One sequence of 16 tokens"
    dense, *_, smaller = report.models
    assert rows[1].values == tuple(f"{2**30 // m.state_bytes:,}" for m in (dense, smaller))
    assert rows[1].verdicts == ("better",)
    weights = 4 * smaller.parameters
    assert rows[3].values[1] == f"{(16 * 10**9 - weights) // smaller.state_bytes:,}"
    kept = report.to_json()["models"][1]["footprint"]
    assert kept["bytes_per_sequence"] == smaller.state_bytes
    assert kept["sequences"]["80 GB"] == (80 * 10**9 - weights) // smaller.state_bytes
    assert findings(report)[0].startswith("1 GiB beside the weights: The compressed model has room for ")
