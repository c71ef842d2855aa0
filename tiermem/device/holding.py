"""Holding: replicas that stay on a device until it is released.

Owns what its holder waits for, and from when on nothing of his uses them. Never copies, and never drops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tiermem.device.backend import Device, Event, Stream
from tiermem.device.copier import Ticket
from tiermem.device.replica import Replica
from tiermem.errors import Closed, DeviceLost, TiermemError


class Holding:
    """What `Residency.hold` gives.

    replicas       in the order of the weights that were asked for
    bytes_copied   of those that were absent; `bytes_shared` of the others, and of weights that were asked for twice
    """

    def __init__(
        self,
        device: Device,
        replicas: Sequence[Replica],
        bytes_copied: int,
        on_failure: Callable[[Replica, TiermemError], None],
        on_release: Callable[[Holding, Iterable[Event]], None],
    ) -> None:
        self.replicas = tuple(replicas)
        self.distinct = tuple(dict.fromkeys(replicas))
        self.bytes_copied = bytes_copied
        self.bytes_shared = sum(replica.nbytes for replica in replicas) - bytes_copied
        self.released = False
        self._device = device
        self._on_failure, self._on_release = on_failure, on_release
        self._streams = list[Stream]()

    def wait(self, stream: Stream | None = None) -> None:
        """Have what is enqueued later in `stream`, by default the current one, start after the copies. The host goes on
        once they are enqueued.

        Raises CopyFailed, DeviceLost, what the source of a weight raised, Closed after the release. Release it then,
        too: what failed is given to nobody else.
        """
        waiting = self._device.current_stream() if stream is None else stream
        self._mark_later(waiting)
        self._ask(lambda ticket: ticket.wait(waiting))

    def result(self) -> None:
        """Return when the copies are done. Raises as `wait` does."""
        self._mark_later(self._device.current_stream())
        self._ask(lambda ticket: ticket.result())

    def done(self) -> bool:
        """Whether all copies have ended, well or not."""
        return all(replica.ticket.done() for replica in self.replicas)

    def release(self, after: Event | None = None) -> None:
        """Let the replicas go, as far as nobody else holds them; a second time, do nothing. Their bytes are overwritten
        only when `after` has passed: by default, where this was waited for, when what was enqueued so far is done in
        the streams that waited and in the current one.

        Raises CopyFailed where the device cannot mark that point; all stays held then.
        """
        if not self.released:
            self._on_release(self, self._marks() if after is None else (after,))

    def _mark_later(self, stream: Stream) -> None:
        if self.released:
            raise Closed("this holding was released; hold its weights again")
        if stream not in self._streams:
            self._streams.append(stream)

    def _ask(self, question: Callable[[Ticket], None]) -> None:
        for replica in self.distinct:
            if not replica.arrived:
                try:
                    question(replica.ticket)
                except TiermemError as error:
                    self._on_failure(replica, error)
                    raise

    def _marks(self) -> list[Event]:
        """Of where the streams are now."""
        if self._streams:
            self._mark_later(self._device.current_stream())
        events = [self._device.event() for _ in self._streams]
        try:
            for event, stream in zip(events, self._streams, strict=True):
                event.record(stream)
        except RuntimeError as error:
            explained = self._device.explain(error, f"the end of a use of replicas on {self._device.name}")
            if not isinstance(explained, DeviceLost):
                raise explained from error
        return events
