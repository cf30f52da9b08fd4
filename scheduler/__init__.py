"""The scheduler: decides which node runs which task, and when.

`core` is placement mechanics, `csucb` the default policy, `baselines` the others, `policies` all of them by name;
`service` runs one against the ledger, `simulator` against simulated nodes.
"""
