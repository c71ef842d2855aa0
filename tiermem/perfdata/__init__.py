"""perf.data: what `perf record` wrote, as samples and the facts that place them. Reads files, never records."""

from tiermem.perfdata.data import Exit, Fork, Image, PerfData
from tiermem.perfdata.events import EventInfo
from tiermem.perfdata.reader import read

__all__ = ["EventInfo", "Exit", "Fork", "Image", "PerfData", "read"]
