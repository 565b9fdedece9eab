"""Counters, gauges and histograms for Prometheus, with vLLM's names."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

# Upper bounds in seconds.
BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)


class Histogram:
    """A histogram of durations."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += times
        self.sum += seconds * times

    def lines(self, name: str, label: str) -> list[str]:
        bounds = [*map(str, BUCKETS), "+Inf"]
        seen = 0
        lines = []
        for bound, count in zip(bounds, self.counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{{label},le="{bound}"}} {seen}')
        lines.append(f"{name}_sum{{{label}}} {self.sum}")
        lines.append(f"{name}_count{{{label}}} {seen}")
        return lines


class Metrics:
    """Counters and histograms of one server. The gauges are passed in when text is requested."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.successes = Counter[str]()
        self.first_token = Histogram()
        self.between_tokens = Histogram()

    def text(self, model: str, running: int, waiting: int) -> str:
        """The metrics in Prometheus' text format, version 0.0.4."""
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        label = f'model_name="{escaped}"'
        lines = [
            *values("num_requests_running", "gauge", {label: running}),
            *values("num_requests_waiting", "gauge", {label: waiting}),
            *values("prompt_tokens_total", "counter", {label: self.prompt_tokens}),
            *values("generation_tokens_total", "counter", {label: self.generation_tokens}),
        ]
        successes = {}
        for reason in ("stop", "length"):
            successes[f'{label},finished_reason="{reason}"'] = self.successes[reason]
        lines += values("request_success_total", "counter", successes)
        for name, histogram in (
            ("vllm:time_to_first_token_seconds", self.first_token),
            ("vllm:inter_token_latency_seconds", self.between_tokens),
        ):
            lines.append(f"# TYPE {name} histogram")
            lines += histogram.lines(name, label)
        return "\n".join(lines) + "\n"


def values(name: str, kind: str, by_labels: dict[str, int]) -> list[str]:
    """The lines for a gauge or counter."""
    lines = [f"# TYPE vllm:{name} {kind}"]
    for labels, value in by_labels.items():
        lines.append(f"vllm:{name}{{{labels}}} {value}")
    return lines
