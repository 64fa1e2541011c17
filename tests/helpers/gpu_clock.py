"""A clock in place of a GPU's, for what is timed on one."""

import torch

from probsym_fast.ops.triton import _device_time


class Clock:
    """A GPU in arithmetic: a run takes 2 ms on it and 5 ms of the host, which does not wait unless it is asked to."""

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0  # the time; when the GPU is done with what is queued
        self.waits = []
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(_device_time.time, "perf_counter", lambda: self.host)

    def run(self, seconds=2e-3):
        self.host += 5e-3
        self.free = max(self.free, self.host) + seconds

    def sleep(self, cycles):
        self.waits.append(cycles)
        self.free = max(self.free, self.host) + cycles / _device_time.CYCLES

    def synchronize(self, *_):
        self.host = max(self.host, self.free)

    def event(self, enable_timing):
        clock = self

        class Event:
            def record(self):
                self.at = max(clock.free, clock.host)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        return Event()
