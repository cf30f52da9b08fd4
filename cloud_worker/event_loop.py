"""One asyncio event loop on a thread of its own, for engines whose clients are asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from queue import SimpleQueue
from typing import Any, TypeVar

from perllm.broker.engine.contract import OnDelta, Stop
from perllm.broker.engine.text import DeltaSink
from perllm.broker.messages import Delta

T = TypeVar("T")
#: Pieces of an answer on their way from the loop to the thread that wants them; None: there are no more.
Pieces = SimpleQueue[Delta | None]


class LoopThread:
    """Other threads hand it coroutines and wait. Everything that binds to an event loop is made and used in here."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it in the loop and wait for its result. From any thread but the loop's own."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def run_streaming(self, coroutine: Coroutine[Any, Any, T], pieces: Pieces, on_delta: OnDelta, stop: Stop) -> T:
        """As `run`, while the calling thread passes on what the coroutine puts into `pieces`. Should `on_delta` fail,
        the generation is cancelled, and the failure raised once the coroutine has ended."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        future.add_done_callback(lambda _: pieces.put(None))
        sink = DeltaSink(on_delta, stop)
        while (piece := pieces.get()) is not None:
            sink.push(piece)
        result = future.result()
        sink.close()
        return result

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what still runs, run `last`, and end the thread."""
        self.run(self._finish(last))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    @staticmethod
    async def _finish(last: Coroutine[Any, Any, None]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last
