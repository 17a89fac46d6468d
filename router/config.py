"""What a router is told at its start. Plain data: it travels to a Ray actor."""

from dataclasses import dataclass, field

from router.tenant import Tenant


@dataclass(frozen=True)
class RouterConfig:
    """One router. `model` is a directory that `engine.hub.resolve` returned; `model_id` is what clients call it."""

    router_id: str
    model: str
    model_id: str
    redis_url: str
    cluster: str = "diptych"
    host: str = "127.0.0.1"
    port: int = 50051  # 0: any free port
    max_inflight: int = 512  # requests admitted at once; more are refused with Overloaded
    max_prompt_bytes: int = 4 * 1024 * 1024
    default_deadline_s: float = 600.0  # for calls that bring none
    worker_wait_s: float = 10.0  # how long a request waits for a pool without a worker, while one may restart
    tenants: tuple[Tenant, ...] = ()  # none: no API key is asked for, and all pages are under `tenant_secret`
    tenant_secret: str = field(default="", repr=False)
