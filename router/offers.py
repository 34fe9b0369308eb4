"""Who has refused a request, as it would be late there, and how long it is worth to go on asking."""

from __future__ import annotations

from cluster.errors import InstanceBusy, Rejected
from cluster.request import ServeRequest, Slo
from router.admission import saturated


class Offers:
    """The refusals of one request.

    Attributes:
        count: all of them.
        give_up_s: loop time at which its first token is due, or its prompt would be ended anyway.
    """

    __slots__ = ("_bound_s", "_rooms_s", "count", "give_up_s")

    def __init__(self, request: ServeRequest, longest_s: float, now_s: float) -> None:
        """
        Args:
            longest_s: no prompt may take longer.
        """
        self._bound_s = min(request.slo.ttft_s, longest_s)
        self.give_up_s = now_s + self._bound_s
        # When its prompt could begin on each that refused it, and shall not be asked yet.
        self._rooms_s: dict[str, float] = {}
        self.count = 0

    @property
    def refused(self) -> frozenset[str]:
        """Instances that are not to be asked now."""
        return frozenset(self._rooms_s)

    @property
    def room_s(self) -> float:
        """Loop time at which the first of them may have room. ValueError when nobody has refused it."""
        return min(self._rooms_s.values())

    def add(self, busy: InstanceBusy, now_s: float) -> None:
        """An instance has refused it."""
        self._rooms_s[busy.instance] = now_s + busy.wait_s
        self.count += 1

    def again(self) -> None:
        """It has waited, and may ask one more time who was to have room first; not all, as many wait."""
        del self._rooms_s[min(self._rooms_s, key=self._rooms_s.__getitem__)]

    def left(self, slo: Slo, now_s: float) -> Slo:
        """What is left of its bounds: how a decision made now must see it."""
        if slo.ttft_s > self._bound_s:
            return slo
        return Slo(ttft_s=max(0.0, self.give_up_s - now_s), tpot_s=slo.tpot_s)

    def rejection(self, now_s: float) -> Rejected:
        """What its client is told when nobody takes it in time."""
        arrived_s = self.give_up_s - self._bound_s
        return saturated(max(self.room_s, now_s) - arrived_s, self._bound_s)
