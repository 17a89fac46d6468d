"""The engine on a GPU: graphs, a host that reads one step late, and the tokens that a plain run gives."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from engine.device_runner import DeviceRunner
from engine.loader import load_model
from engine.packing import pack
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Chunk
from engine.sequence import Finish
from engine_rig import Hopes, Request, make_engine, random_work, run
from kernels.capability import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB = 3000
needs_graphs = pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")


def load(path, dtype, *, heads=8, kv_heads=2, head_dim=64, architecture="llama"):
    """A random model of three layers; its logits are spread by about 1."""
    hidden = heads * head_dim
    config = {
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 2 * hidden,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    (path / "config.json").write_text(json.dumps(config))
    return load_model(path, dtype, "cuda", load="random").model


def work(seed, count=24, **settings):
    return random_work(seed, count, vocab=VOCAB, longest=150, **settings)


def crowd(seed):
    """Work that outgrows 24 pages of 16 tokens."""
    requests = random_work(seed, 24, vocab=VOCAB, longest=100, steps=6)
    return [
        replace(r, answer_len=r.answer_len + 100, end_ids=frozenset(sorted(r.end_ids)[: VOCAB // 100]))
        for r in requests
    ]


def engine(model, runner_class, **settings):
    return make_engine(model, runner_class, **({"num_pages": 200, "token_budget": 256, "page_size": 16} | settings))


def refuse_to_wait(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def never_waits(monkeypatch):
    """Launching a step must not wait for the device."""
    launch = DeviceRunner.launch

    def launch_without_waiting(runner, chunks):
        refuse_to_wait("error")
        try:
            return launch(runner, chunks)
        finally:
            refuse_to_wait("default")

    monkeypatch.setattr(DeviceRunner, "launch", launch_without_waiting)


def furthest(model, requests, answers):
    """By how much a chosen token's logit lies below the largest, at most, when each answer is computed in one pass."""
    worst = 0.0
    for request in requests:
        tokens = [*request.prompt, *answers[request.name]]
        sequence = Request(0, "all", tuple(tokens), 1).sequence(64)
        sequence.pages = list(range(-(-len(tokens) // 64)))
        m = model.config
        cache = torch.zeros(
            len(sequence.pages), m.layers, 2, m.kv_heads, 64, m.head_dim, dtype=model.cache_dtype, device="cuda"
        )
        batch = pack([Chunk(sequence, 0, len(tokens), True)], 64, model.device)
        logits = model.forward(replace(batch, logit_rows=None), cache)[len(request.prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answers[request.name], device="cuda")[:, None])
        worst = max(worst, (logits.max(1, keepdim=True).values - chosen).max().item())
    return worst


@pytest.mark.parametrize("seed", range(2))
def test_float32_gives_the_tokens_of_a_plain_run(tmp_path, never_waits, seed):
    model = load(tmp_path, "float32")
    requests = work(seed)
    expected, how = run(engine(model, ModelRunner), requests)
    answers, finishes = run(engine(model, DeviceRunner), requests)
    assert answers == expected
    assert finishes == how
    assert set(how.values()) == {Finish.STOP, Finish.LENGTH}


@needs_graphs
@pytest.mark.parametrize(
    "shape",
    [
        {"page_size": 16},
        {"page_size": 64, "head_dim": 128},
        {"page_size": 64, "heads": 9, "kv_heads": 3},
        {"page_size": 64, "architecture": "qwen2"},
        {"page_size": 64, "architecture": "qwen3"},
    ],
    ids=str,
)
def test_graphs_choose_the_likeliest_token(tmp_path, never_waits, shape):
    """Batches of different sizes round differently, so a near tie may fall either way: 0.15 is some 5 times bfloat16's
    step at logits of 4, and a random token lies 4 below the likeliest.
    """
    page_size = shape.pop("page_size")
    model = load(tmp_path, "bfloat16", **shape)
    made = engine(model, DeviceRunner, page_size=page_size)
    assert made._runner._decode_graphs is not None
    assert made._runner._prefill_graphs is not None
    requests = work(seed=5)
    answers, _ = run(made, requests)
    assert furthest(model, requests, answers) < 0.15


@needs_graphs
def test_graphs_give_mostly_the_tokens_of_a_plain_run(tmp_path):
    model = load(tmp_path, "bfloat16")
    requests = [replace(request, end_ids=frozenset()) for request in work(seed=6)]
    expected, _ = run(engine(model, ModelRunner), requests)
    answers, _ = run(engine(model, DeviceRunner), requests)
    same = sum(answers[name] == tokens for name, tokens in expected.items())
    assert same >= 0.7 * len(expected), f"{same} of {len(expected)}"


@needs_graphs
def test_a_batch_shrinks_from_the_largest_graph_to_one_row(tmp_path, never_waits):
    model = load(tmp_path, "bfloat16", head_dim=128)
    requests = [Request(0, str(n), tuple(range(3 + n, 23 + n)), 4 + n) for n in range(40)]
    made = engine(model, DeviceRunner, max_sequences=40, num_pages=400, token_budget=1024)
    answers, finishes = run(made, requests)
    assert made._runner._seating.size == 1
    assert set(finishes.values()) == {Finish.LENGTH}
    assert furthest(model, requests, answers) < 0.15


@needs_graphs
def test_who_is_dropped_disturbs_nobody(tmp_path, never_waits):
    model = load(tmp_path, "bfloat16")
    requests = work(seed=8)
    made = engine(model, DeviceRunner)
    answers, finishes = run(made, requests, {step: [str(step % 24)] for step in range(3, 50, 2)})
    assert len(finishes) < len(requests)
    assert furthest(model, [request for request in requests if answers[request.name]], answers) < 0.15


@needs_graphs
def test_rows_of_one_graph_are_sampled_each_in_its_own_way(tmp_path, never_waits):
    model = load(tmp_path, "bfloat16")
    prompts = [tuple(range(3 + 7 * n, 40 + 7 * n)) for n in range(6)]
    plain, _ = run(engine(model, DeviceRunner), [Request(0, "plain", prompts[0], 20)])
    settings = {
        "plain": SamplingParams(),
        "biased": SamplingParams(logit_bias=((77, 100.0),)),
        "banned": SamplingParams(bad_tokens=tuple((token,) for token in plain["plain"])),
        "drawn": SamplingParams(temperature=1.0, top_p=0.9, seed=3, logprobs=2),
        "varied": SamplingParams(frequency_penalty=2.0, presence_penalty=2.0),
        "one": SamplingParams(temperature=1.0, top_k=1, seed=5, logprobs=0),
    }
    prompts[2] = prompts[5] = prompts[0]
    requests = [
        Request(n, name, prompt, 20, sampling=sampling)
        for n, (prompt, (name, sampling)) in enumerate(zip(prompts, settings.items(), strict=True))
    ]
    answers, _ = run(engine(model, DeviceRunner), requests, keep=(kept := {}))
    assert answers["biased"] == [77] * 20
    assert not set(answers["banned"]) & set(plain["plain"])
    assert len(set(answers["varied"])) > 15
    assert furthest(model, [requests[0], requests[5]], answers) < 0.15  # top_k of 1 is greedy
    for name in ("drawn", "one"):
        assert [found.token_id for found in kept[name].logprobs] == answers[name]
        assert all(found.logprob <= 0 for found in kept[name].logprobs)
    assert all(len(found.top_ids) == 2 for found in kept["drawn"].logprobs)
    assert not kept["plain"].logprobs


def test_who_gives_up_its_pages_goes_on_as_if_it_had_not(tmp_path, never_waits):
    """Rows leave with a token unread and come back; draws and penalties go on from where they were."""
    model = load(tmp_path, "float32")
    requests = [
        replace(
            request,
            sampling=SamplingParams(
                temperature=n % 3 / 2, frequency_penalty=n % 2 / 2, repetition_penalty=1.1, seed=n, logprobs=0
            ),
        )
        for n, request in enumerate(crowd(seed=4))
    ]
    expected, how = run(engine(model, DeviceRunner, num_pages=800), requests)
    few = engine(model, DeviceRunner, num_pages=24, lengths=Hopes())
    answers, finishes = run(few, requests, keep=(kept := {}))
    assert few.scheduler.preemptions > 5
    assert (answers, finishes) == (expected, how)
    for name, sequence in kept.items():
        assert [found.token_id for found in sequence.logprobs] == answers[name]


@needs_graphs
def test_rows_of_graphs_are_preempted_and_come_back(tmp_path, never_waits):
    model = load(tmp_path, "bfloat16", head_dim=128)
    requests = crowd(seed=9)
    few = engine(model, DeviceRunner, num_pages=24, lengths=Hopes())
    answers, finishes = run(few, requests)
    assert few.scheduler.preemptions > 5
    assert set(finishes.values()) == {Finish.STOP, Finish.LENGTH}
    assert furthest(model, requests, answers) < 0.15


def test_what_is_drawn_does_not_depend_on_the_batch(tmp_path, never_waits):
    """In float32 no rounding of the batch's size reaches a draw."""
    model = load(tmp_path, "float32")
    requests = [
        replace(request, sampling=SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=n))
        for n, request in enumerate(work(seed=3, count=8))
    ]
    together, _ = run(engine(model, DeviceRunner), requests)
    for request in requests:
        assert run(engine(model, DeviceRunner), [request])[0][request.name] == together[request.name]


@needs_graphs
@pytest.mark.parametrize("length", [1, 15, 16, 17, 300, 512, 1024, 1025])
def test_prompts_of_any_length(tmp_path, never_waits, length):
    """Short ones are graphs, filled up to the next size; longer ones are not."""
    model = load(tmp_path, "bfloat16", head_dim=128)
    requests = [Request(0, "a", tuple(3 + (7 * n) % 2900 for n in range(length)), 6)]
    made = engine(model, DeviceRunner, token_budget=2048, page_size=64)
    answers, _ = run(made, requests)
    assert furthest(model, requests, answers) < 0.15
