"""Placement mechanics, whatever the policy: cluster, pending pool, policy interface; events in, decisions out.

Pure: no I/O and no clock. Imports `broker.messages` alone, never a policy: `scheduler.csucb` and `scheduler.baselines`
import this package. `scheduler.policies` and whoever makes a `SchedulerCore` bring the two together.
"""
