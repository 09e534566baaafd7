"""Values of an emulated Gluon kernel: tensors and scalars with Triton's types, and pointers."""

import math
import operator

import torch
from triton.experimental.gluon import language as gl

from gluon.machine import EmulationError, where

TORCH_DTYPES = {
    gl.int1: torch.bool,
    gl.int8: torch.int8,
    gl.uint8: torch.uint8,
    gl.int16: torch.int16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.float32: torch.float32,
    gl.float64: torch.float64,
}
GLUON_DTYPES = {value: key for key, value in TORCH_DTYPES.items()}


def checked(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers computed in 64 bits, in `dtype`; an overflow is an error."""
    if data.dtype == torch.int64 and dtype != torch.int64 and data.numel():
        low, high = int(data.min()), int(data.max())
        limits = torch.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise EmulationError(f"{where()}: {dtype} overflows: values from {low} to {high}")
    return data.to(dtype)


class Value:
    """gl.tensor: a scalar where the shape is empty."""

    __slots__ = ("data", "layout")
    __hash__ = None

    def __init__(self, data: torch.Tensor, layout=None):
        self.data, self.layout = data, layout

    @property
    def dtype(self):
        return GLUON_DTYPES[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> "Value":
        return self

    @property
    def numel(self) -> int:
        return self.data.numel()

    def to(self, dtype, **_) -> "Value":
        target = TORCH_DTYPES[dtype]
        data = self.data
        if target in (torch.int8, torch.int16, torch.int32, torch.int64) and not data.is_floating_point():
            data = checked(data.long(), target)
        return Value(data.to(target), self.layout)

    def reshape(self, *shape) -> "Value":
        return Value(self.data.reshape(*shape))

    def permute(self, *order) -> "Value":
        return Value(self.data.permute(*order))

    def split(self) -> tuple["Value", "Value"]:
        left, right = self.data.unbind(-1)
        return Value(left), Value(right)

    def __getitem__(self, index) -> "Value":
        layout = getattr(self.layout, "parent", None)
        return Value(self.data[index], layout)

    def __index__(self) -> int:
        if self.data.ndim or self.data.is_floating_point():
            raise EmulationError(f"{where()}: {self!r} is no integer scalar")
        return int(self.data)

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape if self.data.ndim else f'({self.data.item()})'}"


def scalar(value: int | float | bool) -> Value:
    """A runtime scalar as a launch passes it."""
    if isinstance(value, bool):
        return Value(torch.tensor(value))
    if isinstance(value, float):
        return Value(torch.tensor(value, dtype=torch.float32))
    return Value(torch.tensor(value, dtype=torch.int32 if -(2**31) <= value < 2**31 else torch.int64))


def as_value(value) -> Value:
    if isinstance(value, Value):
        return value
    if isinstance(value, bool | int | float):
        return scalar(value)
    raise EmulationError(f"{where()}: {value} is no value to compute with")


def common_dtype(a, b, divide: bool) -> torch.dtype:
    """Triton's: a Python number takes the other operand's type if its kind allows; quotients are float32."""
    x, y = as_value(a).data.dtype, as_value(b).data.dtype
    if not isinstance(a, Value) and (x == torch.bool or y.is_floating_point or not x.is_floating_point):
        dtype = torch.promote_types(x, y) if x == torch.int64 and not y.is_floating_point else y
    elif not isinstance(b, Value) and (y == torch.bool or x.is_floating_point or not y.is_floating_point):
        dtype = torch.promote_types(x, y) if y == torch.int64 and not x.is_floating_point else x
    else:
        dtype = torch.promote_types(x, y)
    if divide and dtype != torch.float64:
        return torch.float32
    return dtype


def binary(function, a, b, *, divide: bool = False, logical: bool = False) -> Value:
    dtype = common_dtype(a, b, divide)
    if dtype == torch.bool and not logical:
        dtype = torch.int32
    a, b = as_value(a), as_value(b)
    if a.data.ndim and b.data.ndim and a.data.ndim != b.data.ndim:
        raise EmulationError(f"{where()}: ranks differ: {a!r} and {b!r}")
    wide = dtype if dtype.is_floating_point or dtype == torch.bool else torch.int64
    result = function(a.data.to(wide), b.data.to(wide))
    layout = a.layout if a.data.ndim else b.layout
    return Value(result if result.dtype == torch.bool else checked(result, dtype), layout)


def _install_operators() -> None:
    def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.div(a, b, rounding_mode="trunc")

    arithmetic = {
        "add": operator.add,
        "sub": operator.sub,
        "mul": operator.mul,
        "floordiv": divide,
        "mod": torch.fmod,
        "and": operator.and_,
        "or": operator.or_,
        "xor": operator.xor,
        "lshift": operator.lshift,
        "rshift": operator.rshift,
        "truediv": operator.truediv,
    }
    comparisons = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
    for name, function in (arithmetic | comparisons).items():
        options = {"divide": name == "truediv", "logical": name in ("and", "or", "xor") or name in comparisons}

        def forward(self, other, function=function, options=options):
            return NotImplemented if isinstance(other, Pointer) else binary(function, self, other, **options)

        def reflected(self, other, function=function, options=options):
            return binary(function, other, self, **options)

        setattr(Value, f"__{name}__", forward)
        if name in arithmetic:
            setattr(Value, f"__r{name}__", reflected)
    Value.__neg__ = lambda self: binary(operator.sub, 0, self)
    Value.__invert__ = lambda self: Value(~self.data, self.layout)


_install_operators()


class Pointer:
    """A pointer, or a block of them, into one tensor: `offsets` count elements from the tensor's first."""

    def __init__(self, tensor: torch.Tensor, offsets: torch.Tensor | None = None):
        self.tensor = tensor
        self.offsets = torch.zeros((), dtype=torch.int64) if offsets is None else offsets

    @property
    def dtype(self):
        return gl.pointer_type(GLUON_DTYPES[self.tensor.dtype])

    @property
    def shape(self) -> list[int]:
        return list(self.offsets.shape)

    @property
    def type(self) -> "Pointer":
        return self

    def __add__(self, other) -> "Pointer":
        return Pointer(self.tensor, self.offsets + as_value(other).data.long())

    __radd__ = __add__

    def __sub__(self, other) -> "Pointer":
        return Pointer(self.tensor, self.offsets - as_value(other).data.long())

    def __getitem__(self, index) -> "Pointer":
        return Pointer(self.tensor, self.offsets[index])

    def to(self, dtype, bitcast: bool) -> "Pointer":
        """As the integer that inline assembly takes for an address."""
        assert bitcast
        assert dtype == gl.int64
        return self

    def place(self, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensor's memory as one row, the offsets and the mask; whatever is not masked must lie in the tensor."""
        span = 1 + sum((n - 1) * s for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        span = span if self.tensor.numel() else 0
        flat = self.tensor.as_strided((span,), (1,))
        mask = torch.tensor(True) if mask is None else as_value(mask).data
        offsets, mask = torch.broadcast_tensors(self.offsets, mask)
        used = offsets[mask]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= span):
            raise EmulationError(f"{where()}: offsets {int(used.min())} to {int(used.max())} of a tensor of {span}")
        return flat, offsets, mask


def load(pointer: Pointer, mask=None, other=None, **_) -> Value:
    """Without `other`, what the mask leaves out is undefined: NaN."""
    flat, offsets, mask = pointer.place(mask)
    undefined = math.nan if flat.is_floating_point() else 0
    fill = as_value(undefined if other is None else other).data.to(flat.dtype)
    result = fill.expand(offsets.shape).clone()
    result[mask] = flat[offsets[mask]]
    return Value(result)


def store(pointer: Pointer, value, mask=None, **_) -> None:
    flat, offsets, mask = pointer.place(mask)
    data = as_value(value).data.to(flat.dtype).expand(offsets.shape)
    flat[offsets[mask]] = data[mask]


def atomic_add(pointer: Pointer, value, mask=None, **_) -> Value:
    flat, offsets, mask = pointer.place(mask)
    before = load(pointer, Value(mask), 0)
    data = as_value(value).data.to(flat.dtype).expand(offsets.shape)
    flat.index_put_((offsets[mask],), data[mask], accumulate=True)
    return before
