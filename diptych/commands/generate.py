"""`diptych generate`."""

import asyncio
import sys
from typing import Annotated

import typer
from rich.console import Console

from diptych.client import Chunk, Client, Sampling
from diptych.commands.options import DEFAULT_NAME, Name, router_of
from diptych.report import Timeline, report
from protos import errors


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it, standard input is read.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="As a user's message in the chat template, or as is.")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer [256].")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time [0].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the K likeliest tokens [off].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest, P in all [off].")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer [random].")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show on standard error where the time went.")] = False,
    deadline: Annotated[float | None, typer.Option(help="Seconds for the whole answer.")] = None,
    name: Name = DEFAULT_NAME,
    endpoint: Annotated[str, typer.Option(envvar="DIPTYCH_ENDPOINT", help="HOST:PORT of a router.")] = "",
) -> None:
    """Ask the model; the answer streams to standard output."""
    text = _read_stdin() if prompt is None else prompt
    options = Sampling()
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_k is not None:
        options["top_k"] = top_k
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    asyncio.run(_stream(endpoint or router_of(name), text, chat, deadline, options, stats))


async def _stream(endpoint: str, text: str, chat: bool, deadline: float | None, options: Sampling, stats: bool) -> None:
    timeline = Timeline()
    last: Chunk | None = None
    async with Client(endpoint) as client:
        if chat:
            messages = [{"role": "user", "content": text}]
            stream = client.generate(messages=messages, deadline_s=deadline, **options)
        else:
            stream = client.generate(text, deadline_s=deadline, **options)
        async for last in stream:
            timeline.note(last)
            sys.stdout.write(last.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    if stats and last is not None:
        Console(stderr=True).print(report([("", last, timeline)]))


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise errors.InvalidRequest("give a prompt, or pipe one in", field="prompt")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidRequest(f"standard input is not UTF-8: {error}", field="prompt") from error
