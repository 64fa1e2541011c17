"""A driver for triton without a GPU: kernels compile, and a launch is only written down."""

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget


class Driver:
    """launched: (grid, arguments) of every launch."""

    def __init__(self, architecture: int = 90):
        self.launched, self.target = [], GPUTarget("cuda", architecture, 32)
        self.utils = SimpleNamespace(
            # no module, which triton would unload by the driver of then; function, registers, spills, most threads
            load_binary=lambda *arguments: (None, 2, 3, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, more, enter, leave, *arguments):
            for hook in filter(None, (enter, leave)):
                hook(more)
            self.launched.append(((x, y, z), arguments))

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target
