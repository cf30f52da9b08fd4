"""The policies CS-UCB is compared with, each one small file behind `scheduler.core.policy.Policy`.

`scheduler.policies.make_policy` makes any of them by name.
"""
