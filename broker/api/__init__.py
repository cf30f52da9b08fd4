"""The HTTP door: the OpenAI dialect over the ledger, so that any OpenAI client can submit and forget (`perllm api`)."""
