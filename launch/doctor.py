"""What is here, what is missing and the command that fixes it. Each finding is looked up, not assumed."""

from __future__ import annotations

from launch.diagnosis.cluster import slurm
from launch.diagnosis.finding import Finding
from launch.diagnosis.gpus import gpus
from launch.diagnosis.gpus_at_work import gpus_at_work
from launch.diagnosis.kernels import apex, chosen_kernels, transformer_engine
from launch.diagnosis.machine import machine
from launch.diagnosis.packages import our_packages, required_packages
from launch.diagnosis.runtime import megatron_core_runs, torch_runs
from launch.diagnosis.tools import tools


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    return [
        *required_packages(),
        torch_runs(),
        megatron_core_runs(),
        *gpus(),
        *gpus_at_work(),
        transformer_engine(),
        apex(),
        chosen_kernels(),
        *slurm(),
        *our_packages(),
        *tools(),
        *machine(),
    ]
