"""Runs the text of Metal kernels on the CPU and checks every access; see docs/simulator.md."""

from .build import available
from .fault import Fault
from .kernel import Kernel, Simulation, metal
from .runner import Counters

__all__ = ["Counters", "Fault", "Kernel", "Simulation", "available", "metal"]
