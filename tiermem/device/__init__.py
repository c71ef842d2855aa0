"""Devices: memory of accelerators for replicas of weights, by torch's device-generic API. Knows no vendor.

backend: one device, its memory, streams and events. arena: the device memory that is ours. staging: pinned host memory
that copies go through. copier: copies on their way. residency: which weights have a replica, and who holds it.
placed: a model on a device; module, stage, staying, worth: how a torch module is streamed through it; carrier, overlap:
what the pool orders and is told. switcher: many models on one device, of which one is current.
"""

from tiermem.device.arena import Arena, Block
from tiermem.device.backend import ALIGN, Device, Event, Registration, Stream, open_device
from tiermem.device.copier import Copier, Ticket
from tiermem.device.holding import Holding
from tiermem.device.replica import Replica, Weight
from tiermem.device.residency import Residency
from tiermem.device.staging import Staging
from tiermem.device.switcher import Switched, Switcher

__all__ = [
    "ALIGN", "open_device", "Device", "Stream", "Event", "Registration",
    "Arena", "Block",
    "Staging",
    "Copier", "Ticket",
    "Weight", "Replica", "Holding", "Residency",
    "Switcher", "Switched",
]  # fmt: skip
