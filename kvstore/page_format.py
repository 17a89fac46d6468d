"""The shape of one KV page, and how two shapes differ."""

from dataclasses import dataclass, fields

from protos import errors
from protos.v1 import common_pb2

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PageFormat:
    """One page is `[layers, 2 (K, V), kv_heads, page_size (tokens), head_dim]` of `dtype`, contiguous.

    Raises `ValueError`, naming the field, for a size below 1 or a dtype that is not in `DTYPE_BYTES`.
    """

    layers: int
    kv_heads: int
    page_size: int  # tokens
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "page_size", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[layers, 2, kv_heads, page_size, head_dim] of one page."""
        return (self.layers, 2, self.kv_heads, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        elements = self.layers * 2 * self.kv_heads * self.page_size * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    def difference(self, other: "PageFormat") -> str:
        """What differs, such as "page_size 16 against 64, head_dim 64 against 128"; empty when equal."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return ", ".join(f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs)

    def to_proto(self) -> common_pb2.PageFormat:
        """The format as a message."""
        return common_pb2.PageFormat(
            layers=self.layers,
            kv_heads=self.kv_heads,
            page_size=self.page_size,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.PageFormat) -> "PageFormat":
        """The message as a format; `FormatMismatch` where it describes no page."""
        try:
            return cls(message.layers, message.kv_heads, message.page_size, message.head_dim, message.dtype)
        except ValueError as error:
            raise errors.FormatMismatch(f"the peer's page format is not valid: {error}") from error
