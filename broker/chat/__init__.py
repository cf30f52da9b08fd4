"""Chat as models write it: a task's messages and tools into a prompt by the model's own template, and what the model
writes back into its thought, its text and its calls of tools.

Models differ in the marks they use. What a template writes is looked at, never assumed of a name
(`perllm.broker.chat.template`); the families known are in `perllm.broker.chat.forms`.
"""

from perllm.broker.chat.forms import PLAIN, AnswerForm
from perllm.broker.chat.stream import AnswerStream
from perllm.broker.chat.template import RESERVED, ChatTemplate, TemplateError

__all__ = ["PLAIN", "RESERVED", "AnswerForm", "AnswerStream", "ChatTemplate", "TemplateError"]
