"""Distributed training: launchers, collectives, model parallelism, and the handling of failures and preemption."""
