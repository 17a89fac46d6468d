"""Texts that an answer must not have, as the token ids that would write them."""

from dataclasses import replace

from engine.sampling_params import MAX_BAD_SEQUENCE_IDS, MAX_BAD_SEQUENCES, SamplingParams
from engine.tokenizer import Tokenizer
from protos.errors import InvalidRequest


def with_bad_words(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same, with the runs of ids of `bad_words` in `bad_tokens`. Raises `InvalidRequest` where they are too many.

    A word is taken as the tokenizer writes it alone, at the beginning of a text and behind a space. The same letters
    cut into other tokens are not found.
    """
    if not sampling.bad_words:
        return sampling
    runs = dict.fromkeys(sampling.bad_tokens)  # in order, each once
    for word in sampling.bad_words:
        for text in (word.lstrip(" "), " " + word.lstrip(" ")):
            run = tuple(tokenizer.encode_part(text))
            if len(run) > MAX_BAD_SEQUENCE_IDS:
                raise InvalidRequest(
                    f"{word[:40]!r} takes {len(run)} tokens, more than the {MAX_BAD_SEQUENCE_IDS} of a bad word",
                    field="bad_words",
                )
            if run:
                runs[run] = None
    if len(runs) > MAX_BAD_SEQUENCES:
        raise InvalidRequest(
            f"bad_words and bad_tokens make {len(runs)} runs of ids: at most {MAX_BAD_SEQUENCES} are taken",
            field="bad_words",
        )
    return replace(sampling, bad_words=(), bad_tokens=tuple(runs))
