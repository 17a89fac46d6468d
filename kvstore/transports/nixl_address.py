"""Where a pool is for NIXL, as an endpoint's address carries it."""

import base64
import binascii
import struct
from dataclasses import dataclass
from typing import Self

from kvstore.transports.base import STAGE
from protos import errors

_LAYOUT = struct.Struct("<QQQi")
_MOST_PAGES = 1 << 26
_MOST = 64 << 10  # characters
_NO_GPU = -1


@dataclass(frozen=True)
class NixlAddress:
    """Addresses in the owner's process: of its header, generations behind it, and of its pages."""

    header: int
    pages: int
    num_pages: int
    device: int | None  # the owner's GPU, by its own number
    metadata: bytes  # of the owner's agent

    def pack(self) -> str:
        device = _NO_GPU if self.device is None else self.device
        return base64.b64encode(_LAYOUT.pack(self.header, self.pages, self.num_pages, device) + self.metadata).decode()

    @classmethod
    def unpack(cls, address: str) -> Self:
        """Raises `WorkerLost` where it is none."""
        try:
            if len(address) > _MOST:
                raise ValueError(f"{len(address)} characters")
            packed = base64.b64decode(address, validate=True)
            header, pages, num_pages, device = _LAYOUT.unpack_from(packed)
            if not 1 <= num_pages <= _MOST_PAGES:
                raise ValueError(f"{num_pages} pages")
        except (ValueError, binascii.Error, struct.error) as error:
            raise errors.WorkerLost(f"this is no address of a pool: {error}", stage=STAGE) from error
        return cls(header, pages, num_pages, None if device == _NO_GPU else device, packed[_LAYOUT.size :])
