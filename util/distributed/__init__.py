"""Distributed training: launchers, collectives, model parallelism and preemption."""
