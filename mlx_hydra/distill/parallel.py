"""Several processes that train together: each has its share of every step's sequences."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

Weights = dict[str, mx.array]


class Processes:
    """The processes that mlx.launch started, or this one alone."""

    def __init__(self):
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()

    @property
    def first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def average(self, values: Weights) -> Weights:
        # As a list: names would be taken apart at their dots. Sorted, here and below: what is sent
        # goes by its turn alone.
        names = sorted(values)
        averaged = nn.average_gradients([values[name] for name in names], self.group)
        return dict(zip(names, averaged))

    def from_first(self, values: Weights) -> Weights:
        """The first process's values, to the bit."""
        if self.size == 1:
            return values
        received = {}
        for name in sorted(values):
            given = values[name] if self.first else mx.zeros_like(values[name])
            received[name] = mx.distributed.all_sum(given, group=self.group)
            mx.eval(received[name])
        return received

    def wait(self) -> None:
        """Go on when all processes have come here."""
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=self.group))

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Tell the end of another process from an error of this one."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and "peer" in str(error):
                raise OSError(f"process {self.rank}: another one has ended ({error}).") from error
            raise

    def expect_same(self, value: int, what: str) -> None:
        """Raise a ValueError unless all processes have the same value of up to 32 bits."""
        values = mx.distributed.all_gather(mx.array([value], mx.uint32), group=self.group).tolist()
        if len(set(values)) > 1:
            raise ValueError(f"{what} differs between the processes: give all of them the same.")
