"""A discrete-event simulator that drives the live system's `Core` on measured step times."""
