"""What the router must know of the model: its tokenizer and sizes. Weights are the workers' affair."""

from dataclasses import dataclass
from pathlib import Path

from engine.model_config import ModelConfig
from engine.tokenizer import Tokenizer
from kvstore.keys import PageKey, root_key
from router.fleet import Identity


@dataclass(frozen=True)
class ServedModel:
    """The one model that a router serves. `model_id` is what clients call it."""

    model_id: str
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def load(cls, model_id: str, path: Path) -> "ServedModel":
        """Read a model directory. Raises `ModelUnusable`."""
        return cls(model_id, ModelConfig.from_dir(path), Tokenizer.from_dir(path))

    def root_key(self, tenant_secret: str, identity: Identity) -> PageKey:
        """The key before the first page, for pages such as these workers hold."""
        fingerprint, page_format = identity
        return root_key(
            tenant_secret=tenant_secret,
            fingerprint=fingerprint,
            format=page_format,
            rope=self.config.rope_identity,
            tokenizer=self.tokenizer.fingerprint,
        )
