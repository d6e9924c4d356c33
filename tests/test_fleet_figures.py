"""Pages of figures of many servers as one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qwen2vl_serve.fleet.figures import together


def page(number: int) -> bytes:
    registry = CollectorRegistry()
    Gauge("plain", "Without labels", registry=registry).set(number)
    counter = Counter("asked", 'With "odd" {labels}', ["why"], registry=registry)
    counter.labels('a "b" {c} \\ d\n').inc(number)
    Histogram("took", "Seconds", ["route"], registry=registry).labels("/x").observe(number)
    return generate_latest(registry)


def test_prometheus_reads_the_page_and_every_sample_says_whose_it_is() -> None:
    """Nothing is lost and no family is told of twice."""
    pages = {"": page(1), "r1": page(2), "r2": page(3), "r3": b""}
    families = list(text_string_to_metric_families(together(pages).decode()))
    assert len({family.name for family in families}) == len(families)
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    for replica, text in (("gateway", page(1)), ("r1", page(2)), ("r2", page(3))):
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                labels = frozenset({**sample.labels, "replica": replica}.items())
                if not sample.name.endswith("_created"):  # a time, another at each making
                    assert found[sample.name, labels] == sample.value
    assert {dict(labels)["replica"] for _, labels in found} == {"gateway", "r1", "r2"}
