"""Whose memory the tensors and arrays in a value lie in. Runs in: both.

A tensor is a view of a storage, an array one of another array or of a tensor: what is kept, when
any of them is kept, is the memory under it. Nothing of the user's is run.
"""

from __future__ import annotations

import gc
import types
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from safeloader._torch import without_overrides
from safeloader.introspect.parts import all_held_by
from safeloader.introspect.values import container_base, definitions, held_by, inherits

DEPTH = 6  # of containers within each other; an object counts for two
_SHARE_MIN = 32  # looks
_NEVER = frozenset(  # looked into; by id, since a metaclass may define ``__eq__``
    map(
        id,
        (
            *(bool, int, float, complex, str, bytes, bytearray, range, type(None)),
            *(type, types.ModuleType, types.CodeType, types.BuiltinFunctionType),
        ),
    )
)


class Memory(NamedTuple):
    """What a tensor or an array lies in.

    Attributes:
        owner: the storage, or the array that was made first over the memory.
        address: of its first byte.
        size_bytes: of the owner.
        used_bytes: of the tensor or array itself; more than there are, where it was expanded.
    """

    owner: Any
    address: int
    size_bytes: int
    used_bytes: int


def memory_of(value: Any) -> Memory | None:
    """Return the memory of a tensor or array; None of what has none in this machine's.

    >>> rows = torch.zeros(4, 8)
    >>> memory_of(rows[1])[2:], memory_of(rows[1]).owner is memory_of(rows).owner
    ((128, 32), True)
    >>> memory_of("text"), memory_of(torch.zeros(3, device="meta"))
    (None, None)
    """
    cls = type(value)
    if cls is torch.Tensor or inherits(cls, torch.Tensor):
        return _of_tensor(value, cls)
    return _of_array(value) if inherits(cls, np.ndarray) else None


def _of_array(value: Any) -> Memory | None:
    array: Any = np.ndarray
    used = int(array.nbytes.__get__(value))
    owner = value
    while inherits(type(base := array.base.__get__(owner)), np.ndarray):
        owner = base
    if inherits(type(base), torch.Tensor):  # it is that tensor's ``numpy()``
        memory = _of_tensor(base, type(base))
        return memory and memory._replace(used_bytes=used)
    address, _ = array.__array_interface__.__get__(owner)["data"]
    return Memory(owner, address, int(array.nbytes.__get__(owner)), used)


def _of_tensor(value: Any, cls: type) -> Memory | None:
    tensor: Any = torch.Tensor
    dispatch = "__torch_dispatch__"
    if cls is not torch.Tensor and len(definitions(cls, dispatch)) > _DISPATCHES:
        return None  # even its size may be an answer of foreign code
    with without_overrides(), suppress(Exception):  # some kinds have no storage
        if tensor.is_cpu.__get__(value) and tensor.layout.__get__(value) is torch.strided:
            storage = tensor.untyped_storage(value)
            used = tensor.numel(value) * tensor.element_size(value)
            return Memory(storage, storage.data_ptr(), storage.nbytes(), used)
    return None


_DISPATCHES = len(definitions(torch.Tensor, "__torch_dispatch__"))


def memories(value: Any, looks: int) -> tuple[list[Memory], bool]:
    """Return the memory of each tensor and array that a value holds; and whether these are all.

    Containers are looked into, what other objects hold in their dicts and slots, the variables of
    generators, and what functions close over.

    Args:
        value: any object.
        looks: how many things to look at for them at most.

    >>> found, all_of_it = memories({"x": torch.zeros(2), "y": [np.zeros(3)]}, looks=9)
    >>> [memory.used_bytes for memory in found], all_of_it
    ([8, 24], True)
    """
    walk = _Walk()
    walk.into(value, DEPTH, looks)
    return walk.found, walk.all_of_it


class _Walk:
    def __init__(self) -> None:
        self.found: list[Memory] = []
        self.all_of_it = True

    def into(self, value: Any, depth: int, looks: int) -> int:
        """Look at a value and what it holds; return how many of the looks are left."""
        cls = type(value)
        looks -= 1
        if id(cls) in _NEVER:
            return looks
        if cls is torch.Tensor or inherits(cls, torch.Tensor, np.ndarray):
            if memory := memory_of(value):
                self.found.append(memory)
            return looks
        depth -= 1 if container_base(cls) else 2
        held = _parts(value, cls, looks + 1) if depth >= 0 else []
        for place, part in enumerate(held):
            if not looks:
                self.all_of_it = False
                break
            # Each gets its share, or one long list would take all; and enough for an element.
            share = min(looks, max(looks // (len(held) - place), _SHARE_MIN))
            looks -= share - self.into(part, depth, share)
        return looks


def _parts(value: Any, cls: type, most: int) -> list[Any]:
    if cls is types.GeneratorType:
        return gc.get_referents(value)[:most]  # its variables; asked for them, its frame keeps them
    if cls is types.FunctionType or cls is types.MethodType:
        return [part for _, part in all_held_by(value, None)][:most]
    return [part for _, part in held_by(value, most)]
