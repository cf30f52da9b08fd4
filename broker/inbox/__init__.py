"""The inbox's work, by what it is about: a message's arguments, what follows a task, and its Celery signals."""
