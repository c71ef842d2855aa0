"""Samplers: what turns facts of the hardware and the kernel into observations of pages. This file owns their names."""

from tiermem.sampler.rungs import RungState, choose, ladder

__all__ = ["RungState", "choose", "ladder"]
