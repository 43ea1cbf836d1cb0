"""What is said to CUDA and when, told to a stand-in for it: errors are not left to the model, devices are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from strapfmt_capture.device_ring import CudaStreams

DEVICE = torch.device("cpu", 0)


class Cuda:
    """Takes note of the calls, each with the device that was the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.current: Any = None
        self.error = 0
        for name, value in {
            "cudart": lambda: self,
            "device": self._device,
            "stream": self._stream,
            "Stream": lambda device: self,
            "Event": lambda **options: self._note("event", self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, **kind: self._launch() or empty(*size, **kind))

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    @contextmanager
    def _stream(self, stream: object) -> Iterator[None]:
        yield

    def _note(self, call: str, result: Any = None) -> Any:
        self.calls.append((call, self.current))
        return result

    def _launch(self) -> None:
        """What any kernel does: raise the error of a call before it, once."""
        error, self.error = self.error, 0
        if error:
            raise RuntimeError(f"CUDA error {error} of an earlier call")

    def wait_event(self, event: object) -> None:
        self._note("wait_event")

    def record(self, stream: object) -> None:
        self._note("record")

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        return int(self._note("register", self.error))

    def cudaHostUnregister(self, address: int) -> int:
        return int(self._note("unregister", 0))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_memory_that_cannot_be_locked_leaves_no_error_behind_for_the_model(cuda: Cuda) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    cuda.error = 2
    with pytest.raises(RuntimeError, match="cudaHostRegister of 64 bytes failed with CUDA error 2"):
        CudaStreams(DEVICE).pin(memory)
    torch.empty(1)  # would raise it


def test_a_thread_of_another_device_locks_and_copies_on_the_right_one(cuda: Cuda) -> None:
    source, target = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    streams = CudaStreams(DEVICE)
    streams.pin(target)()
    streams.fetch(source, target, [cuda])
    assert torch.equal(source, target)
    assert [call for call, _ in cuda.calls] == ["register", "unregister", "event", "wait_event", "record"]
    assert {device for _, device in cuda.calls} == {DEVICE}
