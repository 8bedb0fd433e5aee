"""What Prometheus reads: counts and times since the start, in its text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4"
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_REQUEST = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """How often a value was at most each of some bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads it."""
        reached = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            reached += count
            yield f'{name}_bucket{{le="{bound}"}} {reached}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {reached}"


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status."""
        self.prompt_tokens = self.completion_tokens = 0
        self.cancelled = self.dropped = 0
        self.first_token_seconds = Histogram(_FIRST_TOKEN)
        self.request_seconds = Histogram(_REQUEST)

    def text(self, *, running: int, waiting: int) -> str:
        """All of it.

        Args:
            running: texts that are being written.
            waiting: texts in the queue.
        """
        rows: list[tuple[str, str, str, Sequence[str]]] = [
            (
                "onym_requests_total",
                "counter",
                "Requests that were answered.",
                [f'{{path="{path}",status="{status}"}} {count}' for (path, status), count in sorted(self.requests.items())],
            ),
            ("onym_requests_running", "gauge", "Texts that are being written.", [f" {running}"]),
            ("onym_requests_waiting", "gauge", "Texts in the queue.", [f" {waiting}"]),
            ("onym_requests_cancelled_total", "counter", "Requests whose client left.", [f" {self.cancelled}"]),
            ("onym_requests_dropped_total", "counter", "Requests whose client did not read.", [f" {self.dropped}"]),
            ("onym_prompt_tokens_total", "counter", "Tokens of prompts.", [f" {self.prompt_tokens}"]),
            ("onym_completion_tokens_total", "counter", "Tokens written.", [f" {self.completion_tokens}"]),
        ]
        lines = [
            line
            for name, kind, purpose, values in rows
            for line in (f"# HELP {name} {purpose}", f"# TYPE {name} {kind}", *(name + value for value in values))
        ]
        for name, purpose, histogram in (
            ("onym_time_to_first_token_seconds", "Until the first token of a request.", self.first_token_seconds),
            ("onym_request_seconds", "Until the last token of a request.", self.request_seconds),
        ):
            lines += [f"# HELP {name} {purpose}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
