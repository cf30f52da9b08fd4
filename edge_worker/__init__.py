"""The edge worker: llama.cpp on a CPU, many requests at once, each stoppable and each with its energy.

`engine` is what the worker talks to. Under it, `variants` keeps the models in memory, `batch` steps the requests of
one of them together, and `llama` is llama.cpp's C interface. Decisions are apart from the doing: `plan` (who computes
what in a step, who is put back), `cells` (KV memory), `prefixes` (shared beginnings), `text` (characters and stop
strings), `sampling` (what a producer may ask for). Models are found and made in `models`, read by `gguf` and, where
unknown, first tried by `trial`; `calibrate` measures them at boot; `meters` reads what the node draws.
"""
