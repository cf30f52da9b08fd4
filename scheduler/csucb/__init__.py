"""CS-UCB, the default policy, and what it learns and forecasts with.

`policy` decides; `forecast` and `scoring` are its compiled part, over the rows that `rows` declares and
`cluster_arrays` fills; `node_models`, `step_cost`, `output_lengths`, `bandwidth`, `slot_price` learn. Built on
`scheduler.core`, which knows nothing of it.
"""
