"""Attachment: what lives and dies together with one connection of a client to one daemon. Never connects again."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tiermem.config import descriptor_path, socket_path
from tiermem.rpc import messages as m
from tiermem.rpc.channel import Channel, Stream
from tiermem.rpc.descriptors import DescriptorClient


class Attachment:
    """Connects when it is made, and announces `leases` (lease id -> model id); `refused` are those that the daemon
    could not take over."""

    def __init__(self, address: str, leases: Mapping[str, str]) -> None:
        self.descriptors = DescriptorClient(str(descriptor_path(socket_path(address))))
        self.channel = Channel(address, lambda: self.descriptors.token)
        held = tuple(m.Announcement(lease, model) for lease, model in leases.items())
        self.stream: Stream = self.channel.stream("Attach", m.AttachRequest(m.PROTOCOL, os.getpid(), held))
        self.refused: tuple[str, ...] = ()
        if not held:
            # The token is good already, so the first call need not wait for the stream.
            return
        try:
            self.refused = next(self.stream).refused
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.channel.close()
        self.descriptors.close()
