"""The HTTP API: the OpenAI API and our own endpoints over the ledger (`perllm api`; docs/http-api.md).

A request passes `request_ids`, `request_limits` and, by `dependencies`, `callers` (who is asking) to its endpoint in
`routes/`; that reads the body (`request_body`), has `perllm.broker.openai` translate it, and `submission` makes it a
task. `waiting` waits for results and streams them. `files/`, `batches/` and `webhooks/` each have a `store` of their
documents. In the background, `batches/runner` runs batches (`batches/steps`: what is done for one), and
`webhooks/dispatcher` sends out what the webhook worker, `celery`, delivers. `state` puts the parts of a process
together, `app` the endpoints.
"""
