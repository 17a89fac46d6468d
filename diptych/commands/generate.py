"""`diptych generate`."""

import asyncio
import sys
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from diptych.client import Chunk, Client, Sampling
from diptych.commands.options import DEFAULT_NAME, Name, router_of
from diptych.report import Timeline, logprobs_table, report
from protos import errors


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it, standard input is read.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="As a user's message in the chat template, or as is.")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer [256].")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Tokens before which it does not end [0].")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time [0].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the K likeliest tokens [off].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest, P in all [off].")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, as a share of the likeliest's [off].")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="For tokens of prompt or answer [1: off].")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="For each time in the answer [0: off].")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="For tokens of the answer [0: off].")] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to the logit of this id; may be given again.")
    ] = None,
    bad_word: Annotated[
        list[str] | None, typer.Option(help="Text that the answer must not have; may be given again.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer [random].")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="Id that ends the answer; may be given again.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's own end.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Show log-probabilities on standard error, with so many of the likeliest.")
    ] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="The same for the prompt's tokens.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show on standard error where the time went.")] = False,
    deadline: Annotated[float | None, typer.Option(help="Seconds for the whole answer.")] = None,
    name: Name = DEFAULT_NAME,
    endpoint: Annotated[str, typer.Option(envvar="DIPTYCH_ENDPOINT", help="HOST:PORT of a router.")] = "",
    api_key: Annotated[
        str, typer.Option(envvar="DIPTYCH_API_KEY", show_envvar=True, help="Of a tenant; rather in the environment.")
    ] = "",
) -> None:
    """Ask the model; the answer streams to standard output."""
    text = _read_stdin() if prompt is None else prompt
    options = _given(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        logit_bias=_biases(logit_bias or []),
        bad_words=bad_word,
        seed=seed,
        stop=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    asyncio.run(_stream(endpoint or router_of(name), api_key, text, chat, deadline, options, stats))


async def _stream(
    endpoint: str, api_key: str, text: str, chat: bool, deadline: float | None, options: Sampling, stats: bool
) -> None:
    timeline = Timeline()
    chunks: list[Chunk] = []
    async with Client(endpoint, api_key=api_key) as client:
        if chat:
            messages = [{"role": "user", "content": text}]
            stream = client.generate(messages=messages, deadline_s=deadline, **options)
        else:
            stream = client.generate(text, deadline_s=deadline, **options)
        async for chunk in stream:
            timeline.note(chunk)
            chunks.append(chunk)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    console = Console(stderr=True)
    if any(chunk.logprobs or chunk.prompt_logprobs for chunk in chunks):
        console.print(logprobs_table(chunks))
    if stats and chunks:
        console.print(report([("", chunks[-1], timeline)]))


def _given(**options: Any) -> Sampling:
    """The options that were given; the others are the router's to choose."""
    return cast(Sampling, {name: value for name, value in options.items() if value is not None})


def _biases(pairs: list[str]) -> dict[int, float]:
    """ID=BIAS of each."""
    try:
        return {int(token): float(bias) for token, bias in (pair.split("=") for pair in pairs)}
    except ValueError as error:
        raise errors.InvalidRequest(f"--logit-bias takes ID=BIAS: {error}", field="logit_bias") from error


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise errors.InvalidRequest("give a prompt, or pipe one in", field="prompt")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidRequest(f"standard input is not UTF-8: {error}", field="prompt") from error
