"""`python -m perllm.scheduler.simulator`, the same as `perllm simulate`."""

from perllm.scheduler.simulator.cli import main

main()
