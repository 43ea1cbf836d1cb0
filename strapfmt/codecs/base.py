"""What a codec is: a name, and the options of the Arrow IPC writer that stores its record batches."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.ipc

__all__ = ["Codec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """A lossless codec that Arrow itself decodes.

    Attributes
    ----------
    name : str
        The name in the manifest.
    compression : str or None
        Arrow's buffer compression; None leaves bodies as plain memory, which is what views need.
    level : int or None
        The compression level, None for the library's default.
    """

    name: str
    compression: str | None = None
    level: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a body on disk is the memory of the tensor."""
        return self.compression is None

    def options(self) -> pa.ipc.IpcWriteOptions:
        """Options for an Arrow IPC writer."""
        if self.compression is None:
            return pa.ipc.IpcWriteOptions()
        if self.level is None:
            return pa.ipc.IpcWriteOptions(compression=self.compression)
        return pa.ipc.IpcWriteOptions(compression=pa.Codec(self.compression, compression_level=self.level))
