"""The policies CS-UCB is compared with, each one small file behind `perllm.scheduler.core.policy.Policy`.

`perllm.scheduler.policies.make_policy` makes any of them by name.
"""
