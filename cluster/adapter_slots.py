"""The LoRA adapters of one engine: which are in its slots, which in host memory, and who uses them.

The router keeps one of these per instance, of what it has sent there; a twin keeps one of what it has. The
rules are vLLM 0.32's (`lora/worker_manager.py`, `v1/core/sched/scheduler.py`): requests of at most
`max_loras` adapters run at once, host memory holds `max_cpu_loras`, the least recently used one goes, and
never one that running requests use.
"""

from __future__ import annotations

from hashlib import blake2b

# llm-d's lora-affinity scorer (Gateway API inference extension): loaded, room for one, about to be loaded.
LOADED, ROOM, WAITING, FULL = 1.0, 0.8, 0.6, 0.0


def adapter_id(name: str, path: str) -> int:
    """vLLM's `lora_int_id` of an adapter, 1 to 2**62. Engines go by this number alone, and the ingresses of a
    cluster would count each for itself: so it follows from what the adapter is."""
    digest = blake2b(f"{name}\0{path}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) + 1


class AdapterSlots:
    """Adapters of one engine.

    Attributes:
        users: requests under way, by adapter.
    """

    __slots__ = ("_host", "_most_host", "_most_slots", "_slots", "_waiting", "users")

    def __init__(self, slots: int = 0, host: int = 0) -> None:
        """
        Args:
            slots, host: vLLM's `max_loras` and `max_cpu_loras`; 0 for an engine without adapters.
        """
        self._most_slots = slots
        self._most_host = max(slots, host)
        # The least recently used one first.
        self._slots: dict[str, None] = {}
        self._host: dict[str, None] = {}
        # Asked for while requests of others use all slots, in that order.
        self._waiting: dict[str, None] = {}
        self.users: dict[str, int] = {}

    @property
    def in_slots(self) -> tuple[str, ...]:
        """Those that can run at once, the least recently used one first."""
        return tuple(self._slots)

    @property
    def on_host(self) -> tuple[str, ...]:
        """Those in host memory, the ones in slots among them, the least recently used one first."""
        return tuple(self._host)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Those that wait for a slot, the first to come first."""
        return tuple(self._waiting)

    def is_loaded(self, name: str) -> bool:
        """Whether a request with it needs nothing to be read from its files."""
        return name in self._host

    def can_run(self, name: str) -> bool:
        """Whether a further request with it need not wait for requests of other adapters."""
        return not self._most_slots or name in self._slots or len(self.users) < self._most_slots

    def affinity(self, name: str) -> float:
        """How well a request with it fits here: LOADED, ROOM, WAITING or FULL."""
        if name in self._slots:
            return LOADED
        if len(self.users) < self._most_slots:
            return ROOM
        return WAITING if name in self._waiting else FULL

    def wait_answers(self, name: str) -> float:
        """How long a request with it waits for a slot, in lengths of an answer.

        An adapter with n requests, each somewhere in its answer, is done when the last one is: after n/(n+1)
        of a length, as the largest of n uniform numbers.
        """
        if self.can_run(name):
            return 0.0
        ahead = list(self._waiting).index(name) if name in self._waiting else len(self._waiting)
        rounds, place = divmod(ahead, self._most_slots)
        requests = sorted(self.users[adapter] for adapter in self._slots)[place]
        return rounds + requests / (requests + 1)

    def use(self, name: str) -> bool:
        """A request with it begins, or waits for a slot; True when it is loaded for it now."""
        if not self._most_slots:
            return False
        self.users[name] = self.users.get(name, 0) + 1
        if name in self._waiting:
            return False
        if name not in self._slots and len(self._slots) == self._most_slots:
            unused = next((one for one in self._slots if one not in self.users), None)
            if unused is None:
                self._waiting[name] = None
                return False
            del self._slots[unused]
        return self._activate(name)

    def done(self, name: str) -> None:
        """A request with it has ended or left. The last one's slot goes to the adapter that waits longest."""
        if name not in self.users:
            return
        self.users[name] -= 1
        if self.users[name]:
            return
        del self.users[name]
        self._waiting.pop(name, None)
        if name not in self._slots:
            return
        self._activate(name)  # its last use was now
        if self._waiting:
            del self._slots[name]
            following = next(iter(self._waiting))
            del self._waiting[following]
            self._activate(following)

    def forget(self, name: str) -> None:
        """It was removed from the engine; if requests use it, it will be loaded again."""
        if name not in self.users:
            self._slots.pop(name, None)
            self._host.pop(name, None)

    def hold(self, name: str) -> AdapterHold:
        """`use`, and `done` when the hold is released."""
        return AdapterHold(self, name)

    def _activate(self, name: str) -> bool:
        """Give it its slot, or a free one, as the last one used; True when it had to be loaded."""
        is_new = name not in self._host
        for adapters in (self._slots, self._host):
            adapters.pop(name, None)
            adapters[name] = None
        if len(self._host) > self._most_host:
            del self._host[next(one for one in self._host if one not in self._slots)]
        return is_new


class AdapterHold:
    """A request's use of an adapter; released any number of times."""

    __slots__ = ("_name", "_slots")

    def __init__(self, slots: AdapterSlots, name: str) -> None:
        self._slots: AdapterSlots | None = slots
        self._name = name
        slots.use(name)

    def release(self) -> None:
        """It has ended there."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.done(self._name)

    def __enter__(self) -> AdapterHold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
