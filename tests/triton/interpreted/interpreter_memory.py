"""Caches what Triton's interpreter recomputes for every operation, half of its time; for tests
only.

Every operation makes a tensor, whose type and shape are costly objects; a test has a few hundred
different ones and makes them a hundred thousand times. Nothing that a kernel computes goes through
here.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def _keep_types_of_numbers():
    plain = interpreter._get_np_dtype
    kept = {}

    def get(type):
        if type.name not in kept:
            kept[type.name] = plain(type)
        return kept[type.name]

    interpreter._get_np_dtype = get


def _keep_block_types():
    plain = tl.block_type.__init__
    kept = {}

    def __init__(self, element_ty, shape):
        key = (element_ty.name, *shape)
        found = kept.get(key)
        if found is None:
            plain(self, element_ty, shape)  # refuses invalid shapes
            kept[key] = (self.shape, self.numel, self.name)
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = found

    tl.block_type.__init__ = __init__


def _keep_shapes_of_tensors():
    plain = tl.tensor.__init__
    kept = {}

    def __init__(self, handle, type):
        found = kept.get(type.name)
        if found is None:
            plain(self, handle, type)
            kept[type.name] = (self.shape, self.numel)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found

    tl.tensor.__init__ = __init__


def _keep_names_of_builtins():
    """Otherwise every launch searches all members of the language for those that it replaces while
    it runs."""
    plain = interpreter._patch_builtin
    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {
        id(package): [
            name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)
        ]
        for package in packages
    }

    def patch(package, builder, *scope):
        if id(package) not in names:
            return plain(package, builder, *scope)
        for name in names[id(package)]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch


def keep():
    """Patch this process's interpreter; to be called once, before any kernel is launched."""
    _keep_types_of_numbers()
    _keep_block_types()
    _keep_shapes_of_tensors()
    _keep_names_of_builtins()
