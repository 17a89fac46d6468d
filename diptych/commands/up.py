"""`diptych up` and `diptych down`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from diptych.commands.options import DEFAULT_NAME, Name
from diptych.phases import Phases

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.ready import Show
    from cluster.state import ClusterState


def up(
    config: Annotated[Path | None, typer.Option(help="YAML file with these and more settings; options win.")] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", envvar="DIPTYCH_CLUSTER")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, directory or .gguf file [the demo model].")] = None,
    mode: Annotated[str | None, typer.Option(help="split, or colocated: workers that do both phases [split].")] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers [split: 1].")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers [split: 1].")] = None,
    colocated: Annotated[int | None, typer.Option(min=0, help="Colocated workers [colocated: 1].")] = None,
    redis: Annotated[str | None, typer.Option(help="Metadata server's URL [local: one of our own].")] = None,
    ray_address: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster [local: our own].")] = None,
    host: Annotated[str | None, typer.Option(help="Where router and controller listen [local: loopback].")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The router's port [50051].")] = None,
    operator_port: Annotated[int | None, typer.Option(min=0, max=65535, help="The controller's [50052].")] = None,
    page_size: Annotated[int | None, typer.Option(min=1, help="Tokens in one KV page [64].")] = None,
    num_pages: Annotated[int | None, typer.Option(min=1, help="KV pages of one worker [GPU: what fits; 256].")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Part of its GPU share that a worker takes [0.9].")] = None,
    gpu_share: Annotated[float | None, typer.Option(help="GPUs for each worker, 1 at most [equal shares].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto: a GPU where there is one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 [auto].")] = None,
    host_cache: Annotated[float | None, typer.Option(min=0, help="GiB of memory for pages, on each node [0].")] = None,
    disk_cache: Annotated[float | None, typer.Option(min=0, help="GiB of disk behind that [0].")] = None,
    disk_dir: Annotated[Path | None, typer.Option(help="Where, on each node [the cache folder].")] = None,
    load: Annotated[str | None, typer.Option(help="auto, or random: weights made from config.json [auto].")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one worker [1].")] = None,
    verify: Annotated[str | None, typer.Option(help="none, or checksum: of each page that moves [none].")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait until it is ready.")] = 900,
) -> None:
    """Bring a cluster up and wait until it is ready: on this machine, or on a Ray cluster that runs already."""
    from cluster.config import load_config

    given: dict[str, Any] = {
        "name": name,
        "model": model,
        "mode": mode,
        "prefill": prefill,
        "decode": decode,
        "colocated": colocated,
        "redis": redis,
        "ray_address": ray_address,
        "host": host,
        "port": port,
        "operator_port": operator_port,
        "engine.page_size": page_size,
        "engine.num_pages": num_pages,
        "engine.gpu_memory": gpu_memory,
        "engine.device": device,
        "gpu_share": gpu_share,
        "engine.dtype": dtype,
        "engine.load": load,
        "store.host_gib": host_cache,
        "store.disk_gib": disk_cache,
        "store.disk_dir": disk_dir,
        "engine.threads": threads,
        "verify": verify,
    }
    settings = load_config(config, given)
    begun = time.monotonic()
    with Phases(Console(stderr=True)) as phases:
        state = _bring_up(settings, timeout, phases.show)
    _say_how_to_call(state, time.monotonic() - begun)


def _bring_up(settings: "ClusterConfig", timeout: float, show: "Show") -> "ClusterState":
    if settings.ray_address:
        from cluster import remote

        return remote.bring_up(settings, timeout, show)
    from cluster import local

    return local.bring_up(settings, timeout, show)


def _say_how_to_call(state: "ClusterState", took: float) -> None:
    name = "" if state.name == DEFAULT_NAME else f" --name {state.name}"
    print(
        f"cluster {state.name} serves {state.model} at {state.router} (up in {took:.1f} s)\n"
        f'  ask    diptych generate{name} "What is the capital of France?"\n'
        f"  call   gRPC diptych.v1.Inference, or Python: Client({state.router!r}) from diptych\n"
        f"  see    diptych status{name}\n"
        f"  scale  diptych scale{name} decode=2\n"
        f"  end    diptych down{name}"
    )


def down(name: Name = DEFAULT_NAME) -> None:
    """Take a cluster down and make sure that no process of it is left. Running requests are cut."""
    from cluster.state import StateFile

    file = StateFile(name)
    state = file.read()
    with Phases(Console(stderr=True)) as phases:
        if state is not None and state.ray_address:
            from cluster import remote

            remote.take_down(file, state, phases.show)
            found = True
        else:
            from cluster import local

            found = local.take_down(file, phases.show)
    print(f"cluster {name} is down" if found else f"no cluster {name} was up here")
