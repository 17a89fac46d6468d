"""What a cluster is told at its start, from a YAML file and the command line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.config import EngineConfig, WorkerConfig
from kvstore.redis_url import HELP, RedisUrl
from protos import errors
from router.config import RouterConfig

DEFAULT_NAME = "diptych"
DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_WORKERS = 1024  # of one pool
# The pools of each mode, with the number of workers that each has where none is given.
MODES = {"split": {"prefill": 1, "decode": 1}, "colocated": {"colocated": 1}}
POOLS = tuple(pool for sizes in MODES.values() for pool in sizes)


class _Settings(BaseModel):
    """Unknown keys are errors, and nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Settings):
    """`engine.config.EngineConfig` with its bounds checked."""

    page_size: int = Field(default=EngineConfig.page_size, ge=1, le=4096)
    num_pages: int = Field(default=EngineConfig.num_pages, ge=0)
    gpu_memory: float = Field(default=EngineConfig.gpu_memory, gt=0, le=1)
    token_budget: int = Field(default=EngineConfig.token_budget, ge=0)
    max_sequences: int = Field(default=EngineConfig.max_sequences, ge=0)
    max_waiting: int = Field(default=EngineConfig.max_waiting, ge=1)
    device: str = Field(default=EngineConfig.device, pattern="^(auto|cpu|cuda)$")
    dtype: str = Field(default=EngineConfig.dtype, pattern="^(auto|float32|bfloat16|float16)$")
    load: str = Field(default=EngineConfig.load, pattern="^(auto|random)$")
    threads: int = Field(default=EngineConfig.threads, ge=1)

    def to_engine(self) -> EngineConfig:
        """The same as the plain data that a worker takes."""
        return EngineConfig(**self.model_dump())


class RouterSettings(_Settings):
    """The router's own bounds, as `router.config.RouterConfig` explains them."""

    max_inflight: int = Field(default=RouterConfig.max_inflight, ge=1)
    max_prompt_bytes: int = Field(default=RouterConfig.max_prompt_bytes, ge=1)
    default_deadline_s: float = Field(default=RouterConfig.default_deadline_s, gt=0)


class StoreSettings(_Settings):
    """The page store of each node: pages that outlive the workers' own pools."""

    host_gib: float = Field(default=0.0, ge=0)  # of memory; 0: no page store
    disk_gib: float = Field(default=0.0, ge=0)  # of disk behind it
    disk_dir: Path | None = None  # on each node. None: in the cache folder of the user that runs the node

    @model_validator(mode="after")
    def _memory_first(self) -> Self:
        if self.disk_gib and not self.host_gib:
            raise ValueError("disk_gib: pages reach the disk through memory, so host_gib must be more than 0")
        return self


class TenantSettings(_Settings):
    """Somebody whose requests share pages with nobody else's."""

    secret: str = Field(min_length=16, repr=False)  # its pages' keys come from it; another one, and all are forgotten
    api_key: str = Field(pattern="^[!-~]{16,}$", repr=False)  # that its requests carry
    max_pages: int | None = Field(default=None, ge=1)  # that it may have in each worker's pool. None: all of them


class ClusterConfig(_Settings):
    """One cluster. Without `ray_address` it is local: its own Ray, and a metadata server unless `redis` names one."""

    name: str = Field(default=DEFAULT_NAME, pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    model: str = Field(default=DEFAULT_MODEL, min_length=1)
    mode: str = Field(default="split", pattern=f"^({'|'.join(MODES)})$")
    # Workers of each pool. The pools of another mode have none where no number is given.
    prefill: int = Field(default=1, ge=0, le=MAX_WORKERS)
    decode: int = Field(default=1, ge=0, le=MAX_WORKERS)
    colocated: int = Field(default=0, ge=0, le=MAX_WORKERS)
    redis: str | None = Field(default=None, repr=False)  # its password must not reach a log
    ray_address: str | None = None
    # Where router and controller listen. None: loopback in a local cluster, the node's own address on a Ray cluster.
    host: str | None = None
    port: int = Field(default=50051, ge=0, le=65535)  # the router's; 0: any free port
    operator_port: int = Field(default=50052, ge=0, le=65535)  # the controller's; 0: any free port
    engine: EngineSettings = EngineSettings()
    router: RouterSettings = RouterSettings()
    store: StoreSettings = StoreSettings()
    gpu_share: float | None = Field(default=None, gt=0, le=1)  # of a GPU, for each worker. None: see cluster.gpu_share
    transports: tuple[str, ...] = Field(default=WorkerConfig.transports, min_length=1)
    verify: str = Field(default=WorkerConfig.verify, pattern="^(none|checksum)$")
    # By name. None: whoever reaches the router is answered, and all pages' keys come from `tenant_secret`.
    tenants: dict[str, TenantSettings] = Field(default_factory=dict)
    tenant_secret: str = Field(default="", repr=False)
    start_timeout_s: float = Field(default=600.0, gt=0)  # for one worker to load its model, once it has a place
    drain_timeout_s: float = Field(default=900.0, gt=0)  # for a leaving worker to finish what it has

    @model_validator(mode="before")
    @classmethod
    def _pools_of_mode(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(POOLS, 0) | MODES.get(str(settings.get("mode", "split")), {}) | settings

    @field_validator("redis")
    @classmethod
    def _redis_url(cls, url: str | None) -> str | None:
        try:
            if url is not None:
                RedisUrl.parse(url)
        except ValueError:  # whose words may hold a piece of the password
            raise ValueError(f"must be a {HELP}") from None
        return url

    @model_validator(mode="after")
    def _shared_metadata(self) -> Self:
        if self.ray_address and not self.redis:
            raise ValueError(
                "redis: a cluster on an existing Ray cluster needs a metadata server that every node reaches: "
                "give --redis redis://HOST:PORT"
            )
        if self.port and self.port == self.operator_port:
            raise ValueError("operator_port: must differ from port")
        return self

    @model_validator(mode="after")
    def _tenants_differ(self) -> Self:
        for what in ("secret", "api_key"):
            if len({getattr(tenant, what) for tenant in self.tenants.values()}) < len(self.tenants):
                raise ValueError(f"tenants: each needs a {what} of its own")
        return self


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> ClusterConfig:
    """The file's settings, with the overrides that are not None on top. Dots in an override's name reach inside.

    Raises `FixTheSetup` naming the key that is unknown or has a bad value.
    """
    settings = _read(path) if path else {}
    for name, value in overrides.items():
        if value is not None:
            _put(settings, name.split("."), value)
    try:
        return ClusterConfig.model_validate(settings)
    except ValidationError as error:
        where = f"{path}: " if path else ""
        raise errors.FixTheSetup(f"{where}{_explain(error)}", stage="config") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise errors.FixTheSetup(f"cannot read {path}: {error}", stage="config") from error
    if not isinstance(loaded, dict | None):
        raise errors.FixTheSetup(f"{path}: must hold settings such as `prefill: 2`", stage="config")
    return loaded or {}


def _put(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    *outer, last = keys
    for key in outer:
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            raise errors.FixTheSetup(f"{key}: must hold settings of its own", stage="config")
        settings = inner
    settings[last] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        key = ".".join(str(part) for part in problem["loc"])
        text = "unknown setting" if problem["type"] == "extra_forbidden" else problem["msg"]
        text = text.removeprefix("Value error, ")
        lines.append(f"{key}: {text}" if key else text)
    return "; ".join(lines)


def redact(url: str) -> str:
    """A URL that can be shown: its password replaced by `***`."""
    url = re.sub(r"(://[^/:@]*:).*@", r"\1***@", url)
    return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", url)
