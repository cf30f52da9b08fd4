"""The HTTP API: what the OpenAI API and ours say, over the ledger (`perllm api`; docs/http-api.md).

A request passes `request_limits` and, by `dependencies`, `callers` (who is asking) to its endpoint in `routes/`; that
reads the body (`request_body`), has `perllm.broker.openai` translate it, and `submission` makes it a task. `waiting`
waits for results and streams them. `files/`, `batches/` and `webhooks/` each have a `store`, what is kept of them; in
the background, `batches/runner` runs batches and `webhooks/dispatcher` sends out what `celery`, the webhook worker,
delivers. `state` puts the parts of a process together, `app` the endpoints.
"""
