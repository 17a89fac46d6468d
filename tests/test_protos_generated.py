"""The generated modules are those of the .proto files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generating_again_gives_the_same(tmp_path: Path):
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/v1/*.proto"))
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, *protos], cwd=ROOT, check=True, timeout=60)
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos" / "v1").iterdir()}
    assert len(fresh) == 3 * len(protos)
    stale = [name for name, text in fresh.items() if (ROOT / "protos" / "v1" / name).read_text() != text]
    assert not stale, "run `make protos`"
