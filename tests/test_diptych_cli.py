"""The command line as a script sees it: output, exit codes, and errors in words."""

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import pytest
import pytest_asyncio

from cluster.config import load_config
from cluster.controller import Controller
from cluster.doctor import POOL_TO_POOL, End
from cluster.doctor import Path as MeasuredPath
from cluster.fake_launcher import FakeLauncher
from cluster.operator_service import SERVICE, OperatorService
from cluster.reconcile import Policy
from cluster.state import ClusterState, StateFile
from diptych import cli
from fake_router import FakeRouter
from protos import errors
from protos.v1 import common_pb2, operator_pb2_grpc
from rpc.server import RpcServer, start_server

MAIN = [sys.executable, "-W", "error", "-c", "from diptych.cli import main; main()"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Diptych = Callable[..., Awaitable[Result]]


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIPTYCH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def diptych(monkeypatch, capfd) -> Diptych:
    """Runs one command in a thread of this process, which has everything imported already."""

    def run(arguments: tuple[str, ...], stdin: bytes) -> int:
        monkeypatch.setattr(sys, "argv", ["diptych", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0

    async def command(*arguments: str, stdin: bytes = b"") -> Result:
        code = await asyncio.wait_for(asyncio.to_thread(run, arguments, stdin), 60)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)

    return command


@pytest_asyncio.fixture
async def router() -> AsyncIterator[FakeRouter]:
    yield FakeRouter()


@pytest_asyncio.fixture
async def endpoint(router: FakeRouter) -> AsyncIterator[str]:
    server = await router.serve()
    yield server.address
    await server.stop(0)


async def test_version(diptych):
    assert (await diptych("version")).out.count(".") == 2


async def test_help_names_every_command_and_the_exit_codes(diptych):
    said = (await diptych("--help")).out
    for word in "up down status scale doctor generate replay pull demo version".split():
        assert f" {word} " in said
    assert "130 interrupted" in said


async def test_generate_streams_a_chat_answer(diptych, router, endpoint):
    result = await diptych("generate", "hi there", "--endpoint", endpoint)
    assert result == Result(0, "one two\n", "")
    assert router.requests[0].chat.messages[0].content == "hi there"
    assert router.requests[0].sampling == common_pb2.SamplingParams()


async def test_generate_takes_every_option(diptych, router, endpoint):
    options = (
        "--max-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 7 --stop a --stop b --deadline 30 "
        "--min-tokens 0 --min-p 0.5 --repetition-penalty 1.5 --frequency-penalty -0.5 --presence-penalty 0.25 "
        "--logit-bias 3=-1.5 --logit-bias 4=2 --bad-word x --bad-word y --stop-token-id 8 --ignore-eos "
        "--logprobs 0 --prompt-logprobs 2"
    ).split()
    result = await diptych("generate", "--raw", "hi", "--endpoint", endpoint, *options)
    assert result.code == 0
    request = router.requests[0]
    assert request.text == "hi"
    assert request.sampling == common_pb2.SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        seed=7,
        stop=["a", "b"],
        min_tokens=0,
        min_p=0.5,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.25,
        logit_bias={3: -1.5, 4: 2},
        bad_words=["x", "y"],
        stop_token_ids=[8],
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=2,
    )
    assert 20 < router.deadlines[0] < 31


async def test_log_probabilities_go_to_standard_error(diptych, endpoint):
    result = await diptych("generate", "hi", "--logprobs", "2", "--prompt-logprobs", "2", "--endpoint", endpoint)
    assert result.out == "one two\n"
    assert [line.split() for line in result.err.splitlines()][1:] == [
        [part, token, "-0.500", token, "-0.500", "9", "-1.500"]
        for part, token in (("prompt", "7"), ("prompt", "8"), ("answer", "1"), ("answer", "2"), ("answer", "3"))
    ]


@pytest.mark.parametrize("bias", ["5", "5=", "a=1", "5=1=2"])
async def test_a_bias_that_is_none_is_refused(diptych, endpoint, bias):
    result = await diptych("generate", "hi", "--logit-bias", bias, "--endpoint", endpoint)
    assert result.code == 2
    assert "--logit-bias takes ID=BIAS" in result.err


async def test_generate_sends_the_tenants_key(diptych, router, endpoint, monkeypatch):
    await diptych("generate", "hi", "--endpoint", endpoint)
    await diptych("generate", "hi", "--endpoint", endpoint, "--api-key", "given")
    monkeypatch.setenv("DIPTYCH_API_KEY", "from-environment")
    await diptych("generate", "hi", "--endpoint", endpoint)
    assert router.authorizations == [None, "Bearer given", "Bearer from-environment"]


async def test_generate_reads_standard_input(diptych, router, endpoint):
    result = await diptych("generate", "--raw", "--endpoint", endpoint, stdin="grüße".encode())
    assert result.code == 0
    assert router.requests[0].text == "grüße"
    result = await diptych("generate", "--endpoint", endpoint, stdin=b"\xff\xfe")
    assert result.code == 2
    assert "UTF-8" in result.err


async def test_stats_go_to_standard_error(diptych, endpoint):
    result = await diptych("generate", "hi", "--stats", "--endpoint", endpoint)
    assert result.out == "one two\n"
    assert "pages handed over" in result.err
    assert "4 (0.0 MiB" in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("too hot", field="temperature"), 2),
        (errors.UnknownModel("too hot"), 2),
        (errors.ModelUnusable("too hot"), 3),
        (errors.Overloaded("too hot", retry_after_s=1), 4),
        (errors.NoWorkers("too hot"), 4),
        (errors.DeadlineExceeded("too hot"), 5),
        (errors.DiptychError("too hot"), 1),
    ],
)
async def test_errors_have_their_exit_codes(diptych, router, endpoint, error, code):
    router.error = error
    assert await diptych("generate", "hi", "--endpoint", endpoint) == Result(code, "", "diptych: too hot\n")


async def test_ctrl_c_cancels_the_request(router, endpoint):
    router.hang = True
    process = await asyncio.create_subprocess_exec(
        *MAIN, "generate", "hi", "--endpoint", endpoint, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.read(3), 30) == b"one"
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    await asyncio.wait_for(router.cancelled.wait(), 10)


async def test_no_router_at_the_endpoint(diptych, unused_tcp_port):
    result = await diptych("generate", "hi", "--endpoint", f"127.0.0.1:{unused_tcp_port}")
    assert result.code == 4
    assert str(unused_tcp_port) in result.err


@pytest.mark.parametrize("command", [["generate", "hi"], ["status"], ["scale", "decode=2"]])
async def test_without_a_cluster_it_says_how_to_get_one(diptych, command):
    result = await diptych(*command)
    assert result.code == 4
    assert "diptych up" in result.err


async def test_a_cluster_that_ended_says_why(diptych):
    state = ClusterState(name="diptych", phase="failed", operator="h:1", error_code="internal", error="out of disk")
    StateFile("diptych").write(state)
    result = await diptych("status")
    assert result.code == 4
    assert "out of disk" in result.err


async def test_generate_finds_the_router_of_the_named_cluster(diptych, endpoint):
    StateFile("mine").write(ClusterState(name="mine", phase="ready", router=endpoint))
    assert (await diptych("generate", "hi", "--name", "mine")).out == "one two\n"


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["fly"], 2, "fly"),
        (["generate", "hi", "--max-tokens", "many"], 2, "max-tokens"),
        (["scale", "decode"], 2, "POOL=N"),
        (["scale", "decode=-1"], 2, "POOL=N"),
        (["scale", "decode=1", "decode=2"], 2, "twice"),
        (["up", "--prefill", "-1"], 2, "prefill"),
        (["up", "--config", "nowhere.yaml"], 3, "nowhere.yaml"),
        (["up", "--ray-address", "10.0.0.1:6379"], 3, "--redis"),
        (["up", "--dtype", "int4"], 3, "engine.dtype"),
        (["up", "--mode", "both"], 3, "mode"),
        (["pull", "no such model"], 2, "no such model"),
    ],
)
async def test_what_is_wrong_is_named(diptych, arguments, code, named):
    result = await diptych(*arguments)
    assert result.code == code
    assert named in result.err


@pytest.mark.parametrize(
    ("options", "sizes"),
    [([], (1, 1, 0)), (["--mode", "colocated"], (0, 0, 1)), (["--mode", "colocated", "--colocated", "3"], (0, 0, 3))],
)
async def test_up_starts_the_pools_of_the_mode(diptych, monkeypatch, options, sizes):
    asked = []

    def bring_up(config, deadline_s, show):
        asked.append((config.prefill, config.decode, config.colocated))
        return ClusterState(name="diptych", phase="ready", router="h:1")

    monkeypatch.setattr("cluster.local.bring_up", bring_up)
    assert (await diptych("up", *options)).code == 0
    assert asked == [sizes]


async def test_an_unknown_key_in_the_file_is_named(diptych, tmp_path):
    (tmp_path / "c.yaml").write_text("decod: 2")
    result = await diptych("up", "--config", str(tmp_path / "c.yaml"))
    assert result == Result(3, "", f"diptych: {tmp_path}/c.yaml: decod: unknown setting\n")


async def test_down_without_a_cluster_is_done(diptych):
    result = await diptych("down")
    assert result.code == 0
    assert "no cluster diptych" in result.out


async def test_a_state_file_that_cannot_be_read_is_named(diptych):
    state = StateFile("diptych")
    state.make_folder()
    state.path.mkdir()
    result = await diptych("status")
    assert result.code == 3
    assert str(state.path) in result.err


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_bug_is_told_as_one(monkeypatch, capsys, debug):
    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setenv("DIPTYCH_DEBUG", debug)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError: oh\nThis is a bug" in said
    assert ("Traceback" in said) == bool(debug)


def test_a_clients_installation_says_what_serving_needs():
    program = "import sys; sys.modules['psutil'] = None; sys.argv = ['diptych', 'down']\n" + MAIN[-1]
    done = subprocess.run([*MAIN[:-1], program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "psutil is not installed" in done.stderr
    assert "diptych[serve]" in done.stderr


class Operated(NamedTuple):
    launcher: FakeLauncher
    server: RpcServer


@pytest_asyncio.fixture
async def operated(monkeypatch) -> AsyncIterator[Operated]:
    """A controller with processes that a test plays, and its operator service."""
    monkeypatch.setattr("cluster.controller._TICK_S", 0.02)

    async def ping() -> None:
        return

    launcher = FakeLauncher()
    config = load_config(None, {"decode": 2, "redis": "redis://:secret@h:1", "model": "tiny"})
    controller = Controller(config, launcher, ping, Policy())
    running = asyncio.create_task(controller.run())
    service = OperatorService(controller, asyncio.Event())
    server = await start_server(
        lambda server: operator_pb2_grpc.add_OperatorServicer_to_server(service, server), [SERVICE], "127.0.0.1", 0
    )
    while not controller.status().ready:
        await asyncio.sleep(0.01)
    yield Operated(launcher, server)
    controller.shutdown()
    await asyncio.wait_for(running, 30)
    await server.stop(0)


async def test_status_shows_what_runs(diptych, operated):
    result = await diptych("status", "--operator", operated.server.address)
    assert result.code == 0
    for word in ("ready", "tiny", "decode-2:", "2 desired", "router-1:50051", "redis://:***@h:1 answers", " cpu"):
        assert word in result.out
    assert "secret" not in result.out


async def test_doctor_names_what_is_slow(diptych, operated, monkeypatch):
    slow = {"prefill-1": "", "decode-1": "", "decode-2": "shm: not this host"}

    def measure(source: End, reader: End) -> MeasuredPath:
        assert "prefill-1" in (source.id, reader.id)
        assert reader.host == reader.id
        return MeasuredPath(source.id, reader.id, POOL_TO_POOL, "tcp", 2.5, 64.0, 1.25, slow=slow[reader.id])

    monkeypatch.setattr("cluster.doctor.measure", measure)
    result = await diptych("doctor", "--operator", operated.server.address)
    assert result.code == 3
    for words in ("prefill-1 decode-1 pool to pool tcp 2.50 64 1.25 ms ok", "slower than expected: shm: not this host"):
        assert words in " ".join(result.out.split())
    slow["decode-2"] = ""
    result = await diptych("doctor", "--json", "--operator", operated.server.address)
    assert result.code == 0
    assert [(path["source"], path["reader"]) for path in json.loads(result.out)] == [
        ("prefill-1", "decode-1"),
        ("prefill-1", "decode-2"),
        ("decode-1", "prefill-1"),
        ("decode-2", "prefill-1"),
    ]


async def test_status_as_json(diptych, operated):
    result = await diptych("status", "--json", "--operator", operated.server.address)
    said = json.loads(result.out)
    assert said["ready"] is True
    assert said["redis_alive"] is True
    assert [(pool["pool"], pool["desired"], len(pool["workers"])) for pool in said["pools"]] == [
        ("prefill", 1, 1),
        ("decode", 2, 2),
        ("router", 1, 1),
    ]
    assert said["pools"][0]["workers"][0]["state"] == "WORKER_STATE_READY"
    assert "secret" not in result.out


async def test_scale_waits_for_those_who_leave(diptych, operated):
    address = operated.server.address
    waiting = asyncio.create_task(diptych("scale", "decode=1", "prefill=2", "--wait", "--operator", address))
    while operated.launcher.living("prefill") != ["prefill-1", "prefill-2"]:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert not waiting.done()
    operated.launcher.processes["decode-2"].drained.set()
    assert (await waiting).out == "scaled to decode=1 prefill=2\n"
    assert operated.launcher.living("decode") == ["decode-1"]


async def test_colocated_workers_can_be_added(diptych, operated):
    address = operated.server.address
    assert (await diptych("scale", "colocated=1", "--wait", "--operator", address)).out == "scaled to colocated=1\n"
    assert "colocated 1 desired" in " ".join((await diptych("status", "--operator", address)).out.split())


async def test_scale_of_an_unknown_pool_is_refused(diptych, operated):
    result = await diptych("scale", "gpu=1", "--operator", operated.server.address)
    assert result.code == 2
    assert "gpu" in result.err


async def test_generate_asks_the_controller_where_up_did_not_come_to_its_end(diptych, operated, router, endpoint):
    operated.launcher.processes["router-1"].die("so that the next one is where the test listens")
    port = int(endpoint.rpartition(":")[2])
    operated.launcher.prepare = lambda process: vars(process).update(worker_id="127.0.0.1", port=port)
    while endpoint not in (await diptych("status", "--operator", operated.server.address)).out:
        await asyncio.sleep(0.05)
    StateFile("mine").write(ClusterState(name="mine", phase="workers", operator=operated.server.address))
    assert (await diptych("generate", "hi", "--name", "mine")).out == "one two\n"


async def test_replay_prints_the_share_of_hits(diptych, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"hash_ids": blocks}) + "\n" for blocks in ([0, 1, 2], [0, 1, 3], [0, 1, 2])))
    for pages, hits in ((0, 5), (3, 4)):
        said = await diptych("replay", str(trace), "--pages", str(pages), "--policy", "lru", "--json")
        result = json.loads(said.out)
        assert (result["requests"], result["blocks"], result["hits"]) == (3, 9, hits)
        assert result["hit_rate"] == hits / 9
    said = await diptych("replay", str(trace), "--pages", "100")
    assert "hit rate  0.5556" in said.out


@pytest.mark.parametrize(
    ("content", "arguments", "named"),
    [
        (None, ["--pages", "10"], "no file"),
        ('{"hash_ids": [1]}\nx\n', ["--pages", "10"], "after line 2"),
        ('{"hash_ids": [1]}\n', ["--pages", "-1"], "--pages"),
        ('{"hash_ids": [1]}\n', ["--pages", "1", "--policy", "fifo"], "fifo"),
    ],
)
async def test_a_trace_that_cannot_be_replayed_is_named(diptych, tmp_path, content, arguments, named):
    trace = tmp_path / "trace.jsonl"
    if content is not None:
        trace.write_text(content)
    result = await diptych("replay", str(trace), *arguments)
    assert result.code == 2
    assert named in result.err
