# mypy: allow-untyped-defs, allow-untyped-decorators
"""Programmatic dependent launch: a kernel starts while the one in front of it in the stream still runs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def after_previous_kernel():
    """Nothing below runs before the kernels in front of this one in the stream have ended (a no-op where they have)."""
    x = gl.to_tensor(0)
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_start():
    """A kernel launched to overlap this one starts as soon as all programs of this one have come here or ended."""
    x = gl.to_tensor(0)
    asm: gl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(asm, "=r,r", [x], gl.int32, is_pure=False, pack=1)
