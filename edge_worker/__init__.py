"""The edge worker: llama.cpp on a CPU, many requests at once, each stoppable and each with its energy.

`engine` is what the node worker talks to. Under it, `model_pool` keeps the models in memory, `batch` steps the requests
of one of them together, and `llama` is llama.cpp's C interface. Decisions are apart from what they cause: `batch_plan`
(who computes what in a step, whom to preempt), `kv_cells` (KV memory), `prefix_cache` (shared prompt prefixes),
`text_stream` (characters and stop strings), `sampling` (samplers, grammars and chat templates). Models are found and
quantised in `model_files`, read by `gguf` and, where unknown, loaded by `preflight` first; `calibrate` measures them at
the start; `meters` reads the node's power.
"""
