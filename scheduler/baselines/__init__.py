"""The policies CS-UCB is compared with, one algorithm per file, each behind `perllm.scheduler.core.policy.Policy`.

`perllm.scheduler.policies.make_policy` makes any of them by name. What several share: `base` (randomness, snapshot),
`mean_length` and `calibrated_forecast` (what a plain heuristic expects), `on_time_reward` (what a textbook bandit
learns), `one_tier`; `with_admission` is what `+mech` adds to any of them.
"""
