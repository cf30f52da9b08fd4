"""`python -m scheduler.simulator`, the same as `perllm simulate`."""

from scheduler.simulator.cli import main

main()
