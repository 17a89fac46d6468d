"""How fast others' pages come here, as far as the pulls tell that ended."""

_FADE = 0.95  # of what was seen, kept at each pull


class PullRates:
    """Bytes/s by transport: the slope through the origin that fits recent pulls best (least squares). A large pull, the
    time of which matters, weighs more than a small one, which is mostly its start.
    """

    def __init__(self) -> None:
        self.by_transport: dict[str, float] = {}  # replaced as a whole: any thread may read it
        self._sums: dict[str, tuple[float, float]] = {}  # of bytes squared, and of bytes times seconds

    def add(self, transport: str, moved: int, seconds: float) -> None:
        """Count a pull that brought all its pages."""
        squares, products = self._sums.get(transport, (0.0, 0.0))
        sums = _FADE * squares + moved * moved, _FADE * products + moved * seconds
        if sums[1] > 0.0:
            self._sums[transport] = sums
            self.by_transport = self.by_transport | {transport: sums[0] / sums[1]}
