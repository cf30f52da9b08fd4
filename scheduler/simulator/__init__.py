"""A discrete-event simulator that drives the live system's `SchedulerCore` on measured step times."""
