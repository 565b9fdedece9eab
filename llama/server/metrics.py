"""What a server did, as Prometheus reads it, under the names that vLLM gave these figures."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

# Upper bounds in seconds.
BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """How often which durations were seen."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += times
        self.sum += seconds * times

    def lines(self, name: str, label: str) -> list[str]:
        seen, lines = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self.counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{{label},le="{bound}"}} {seen}')
        return [*lines, f"{name}_sum{{{label}}} {self.sum}", f"{name}_count{{{label}}} {seen}"]


class Metrics:
    """Counters and histograms of one server; its gauges are read when they are asked for."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = 0
        self.successes = Counter[str]()
        self.first_token, self.between_tokens = Histogram(), Histogram()

    def text(self, model: str, running: int, waiting: int) -> str:
        """Prometheus' text format, version 0.0.4."""
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        label = f'model_name="{escaped}"'
        successes = [(f'{label},finished_reason="{reason}"', self.successes[reason]) for reason in ("stop", "length")]
        lines: list[str] = []
        for name, kind, values in (
            ("num_requests_running", "gauge", [(label, running)]),
            ("num_requests_waiting", "gauge", [(label, waiting)]),
            ("prompt_tokens_total", "counter", [(label, self.prompt_tokens)]),
            ("generation_tokens_total", "counter", [(label, self.generation_tokens)]),
            ("request_success_total", "counter", successes),
        ):
            lines += [f"# TYPE vllm:{name} {kind}", *(f"vllm:{name}{{{labels}}} {value}" for labels, value in values)]
        for name, histogram in (
            ("time_to_first_token_seconds", self.first_token),
            ("inter_token_latency_seconds", self.between_tokens),
        ):
            lines += [f"# TYPE vllm:{name} histogram", *histogram.lines(f"vllm:{name}", label)]
        return "\n".join(lines) + "\n"
