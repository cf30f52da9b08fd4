"""A discrete-event simulator that drives the live system's `SchedulerCore` on measured step times.

- What is simulated: `scenario` (one TOML file), `workload` (what arrives), `csv_trace` and `trace` (recorded arrivals),
  `capacity` (what loads are shares of).
- The machines: `node` (queue, slots, receipts), `engine` (continuous batching), `step_table` (measured step times),
  `link` (shared bandwidth), `speed_changes` (noise, drift, faults), all on `clock`.
- A run: `simulation`, its `result`; many of them: `sweep`, `report`; `cli` is `perllm simulate`, `export` is
  `perllm trace export`.
- Policies: `oracles`, which exist here only and look ahead by `rollout`; `pretraining` of those that must learn first.
- Yardsticks: `clairvoyant`, the best schedules found in hindsight; `bound`, what none can exceed.
"""
